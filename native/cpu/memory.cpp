#include "memory.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>

namespace halfbyte {

namespace {

constexpr std::size_t LINE = 64, HUGE_PAGE = std::size_t{2} << 20, CHUNK = 16 * HUGE_PAGE;

struct Chunk {
    explicit Chunk(std::size_t size) : size(size), memory(static_cast<std::uint8_t*>(std::aligned_alloc(HUGE_PAGE, size))) {
        if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(memory, size, MADV_HUGEPAGE);  // a wish: without it everything works, only slower
#endif
    }
    ~Chunk() { std::free(memory); }
    Chunk(const Chunk&) = delete;
    Chunk& operator=(const Chunk&) = delete;

    std::size_t size, used = 0;
    std::uint8_t* memory;
};

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

std::shared_ptr<std::uint8_t> weight_memory(std::size_t nbytes) {
    static std::mutex mutex;
    static std::weak_ptr<Chunk> open;  // the chunk that is being filled, while anything in it is in use
    const std::size_t size = round_up(nbytes, LINE);
    if (size > CHUNK / 4) {
        const auto own = std::make_shared<Chunk>(round_up(size, HUGE_PAGE));
        return {own, own->memory};
    }
    const std::lock_guard<std::mutex> lock(mutex);
    auto chunk = open.lock();
    if (!chunk || chunk->used + size > chunk->size) open = chunk = std::make_shared<Chunk>(CHUNK);
    std::uint8_t* memory = chunk->memory + chunk->used;
    chunk->used += size;
    return {chunk, memory};
}

}  // namespace halfbyte
