// Memory for weights, in huge pages where the system grants them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace halfbyte {

// `nbytes` aligned to a line, not initialized; given back when the last copy is gone. Matrices taken one after the other
// lie one after the other in pages of 2 MiB: a matrix of half a megabyte in pages of 4 KiB would need 128 entries of a TLB
// that a step through all weights never hits, and in a virtual machine a miss costs two walks. Throws std::bad_alloc.
std::shared_ptr<std::uint8_t> weight_memory(std::size_t nbytes);

}  // namespace halfbyte
