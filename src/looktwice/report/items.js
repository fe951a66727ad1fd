// What pages of many items share: elements made of text alone, pictures with boxes, and a list that grows as it is read.
"use strict";
const BATCH = 6, AHEAD = 600, MOST_LABELS = 3;
const data = JSON.parse(document.getElementById("data").textContent);

// An element; strings among its children are text, never markup.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== ""));
  return element;
};

// A picture by its number, with boxes in pixels of `size` = [width, height], each {box, label, gold}.
const framed = (number, { size, boxes = [], caption, isCrop = false, alt = "" } = {}) => {
  const image = number == null ? null : data.images[number];
  if (!image) return make("figure", { class: "gone" }, make("figcaption", {}, `${caption} (no picture)`));
  const percent = (share) => `${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%`;
  const marks = boxes.map(({ box: [left, top, right, bottom], label, gold }) => {
    const [width, height] = size;
    const near = [top < height / 6 && "top", bottom > (height * 5) / 6 && "bottom", left > (width * 2) / 3 && "right"];
    return make(
      "span",
      {
        class: ["mark", gold && "gold", ...near].filter(Boolean).join(" "),
        style: { inset: [top / height, 1 - right / width, 1 - bottom / height, left / width].map(percent).join(" ") },
      },
      label ? make("b", {}, label) : null,
    );
  });
  const shown = make("img", { src: image.src, width: image.w, height: image.h, alt, class: image.big && "pixels" });
  return make(
    "figure",
    { class: isCrop ? "crop" : "picture", style: { "--width": `${image.w}px` } },
    make("span", { class: "frame" }, shown, marks),
    caption ? make("figcaption", {}, caption) : null,
  );
};

// Fills `place` with what `render` makes of the items: some at once, more as the reader comes near the end.
let watched = null;
const fill = (place, items, render) => {
  watched?.disconnect();
  const end = make("div", { class: "end" }, items.length ? null : make("p", { class: "note" }, "Nothing matches the filter."));
  place.replaceChildren(end);
  let shown = 0;
  const more = () => {
    do {
      end.before(...items.slice(shown, shown + BATCH).map(render));
      shown += BATCH;
    } while (shown < items.length && end.getBoundingClientRect().top < innerHeight + AHEAD);
    if (shown >= items.length) watched.disconnect();
  };
  watched = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && more(), {
    rootMargin: `${AHEAD}px`,
  });
  watched.observe(end);
  more();
};

// The same boxes, each once with all its labels.
const merged = (boxes) => {
  const places = new Map();
  for (const { box, label } of boxes) places.set(`${box}`, { box, labels: [...(places.get(`${box}`)?.labels ?? []), label] });
  return [...places.values()].map(({ box, labels }) => ({
    box, label: labels.length > MOST_LABELS ? `${labels.length} crops` : labels.join(", "),
  }));
};

// Choices of a filter: [value, words].
const offer = (select, choices) => select.append(...choices.map(([value, words]) => make("option", { value }, words)));

// The values of all fields of the filter by their names; `changed` is called at once and at each change.
const filter = (form, changed) => {
  const read = () => changed(Object.fromEntries(new FormData(form)));
  form.addEventListener("input", read);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(read));
  read();
};

const signed = (number, digits = 2) => (number > 0 ? "+" : "") + number.toFixed(digits);
const boxText = (box) => (box ? `[${box.map((one) => +one.toFixed(1)).join(", ")}]` : "no box");
const verdict = (isRight, words) => make("p", { class: isRight ? "right" : "wrong" }, words);
