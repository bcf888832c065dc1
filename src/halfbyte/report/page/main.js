const DATA = JSON.parse(document.getElementById("data").textContent);
const LIMITS = DATA.models.length ? DATA.models[0].limits : {};

function layers(models) {
  const holder = el("div");
  const draw = (index) => {
    const model = models[index];
    const open = panel(model);
    holder.replaceChildren(heatmap(model, open), kinds(model), linears(model, open), totals(model));
  };
  draw(0);
  const pick = models.length > 1 ? el("div", { class: "controls" }, labelled("Model", choice(models.map((model, index) => [index, called(model)]), draw))) : null;
  const text = models[0].calibration ? `Errors of the outputs are over ${whole(models[0].calibration.tokens)} tokens of ${models[0].calibration.source}, against the 16-bit reference ${models[0].reference}.` : `Against the 16-bit reference ${models[0].reference}; no activations were collected.`;
  return section("layers", "Layers", el("p", { class: "name" }, text), pick, holder);
}

function theme() {
  const button = document.getElementById("theme");
  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const say = () => { button.textContent = dark() ? "Light colours" : "Dark colours"; };
  button.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; say(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", say);
  say();
}

const sections = [summary(DATA)];
if (DATA.comparison) sections.push(comparison(DATA.comparison));
if (DATA.models.length) sections.push(layers(DATA.models));
if (DATA.profile) sections.push(profile(DATA.profile));
if (DATA.speculation) sections.push(speculation(DATA.speculation));
if (DATA.models.length || DATA.comparison) sections.push(manifest(DATA));
if (DATA.lessons.length) sections.push(lessons(DATA.lessons));
if (sections[0].childElementCount === 1) sections.shift();
document.getElementById("content").replaceChildren(...sections, el("footer", { class: "quiet" }, `Made by halfbyte ${DATA.version}. This page loads nothing.`));
document.getElementById("contents").replaceChildren(...sections.map((one) => el("a", { href: `#${one.id}` }, one.querySelector("h2").textContent)));
theme();
document.documentElement.dataset.ready = "true";
