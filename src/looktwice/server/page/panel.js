// One answer of one model: where it looks, what it thinks and says.

const SMALL_PX = 300;

function element(name, settings = {}, ...children) {
  const made = Object.assign(document.createElement(name), settings);
  made.append(...children);
  return made;
}

function percent(part, whole) {
  return `${(100 * part) / whole}%`;
}

export class Panel {
  constructor(model, pictures) {
    this.root = document.getElementById("panel").content.cloneNode(true).firstElementChild;
    this.model = model;
    this.pictures = pictures;
    this.find("h3").textContent = model;
    this.clear();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  clear() {
    this.content = "";
    this.trace = null;
    this.numCrops = 0;
    this.frames = new Map();
    for (const name of [".pictures", ".crops", ".answer", ".thinking p"]) this.find(name).replaceChildren();
    for (const name of [".thinking", ".problem", ".actions"]) this.find(name).hidden = true;
    this.pictures.forEach((picture, place) => picture.isNew && this.frameOf(place + 1));
    this.say("waiting");
  }

  say(text) {
    this.find(".state").textContent = text;
  }

  /** The picture of this number, shown from when something is marked on it. */
  frameOf(number) {
    const picture = this.pictures[number - 1];
    if (!picture) return null;
    if (!this.frames.has(number)) {
      const image = element("img", { src: picture.url, alt: `picture ${number}: ${picture.name}` });
      image.classList.toggle("small", Math.max(picture.width, picture.height) < SMALL_PX);
      const frame = element("figure", { className: "frame" }, image);
      this.frames.set(number, frame);
      this.find(".pictures").append(frame);
    }
    return this.frames.get(number);
  }

  mark(number, [x1, y1, x2, y2], label, kind) {
    const frame = this.frameOf(number);
    if (!frame) return null;
    const { width, height } = this.pictures[number - 1];
    const mark = element("span", { className: `mark ${kind}` });
    if (label) mark.append(element("b", { textContent: label }));
    mark.classList.toggle("top", y1 < 0.1 * height);
    mark.classList.toggle("right", x1 > 0.6 * width);
    Object.assign(mark.style, { left: percent(x1, width), top: percent(y1, height) });
    if (x2 !== undefined) Object.assign(mark.style, { width: percent(x2 - x1, width), height: percent(y2 - y1, height) });
    frame.append(mark);
    return mark;
  }

  /** What a chunk of the stream tells. */
  take(chunk) {
    const choice = chunk.choices[0];
    if (!choice) return;
    if (choice.delta.reasoning) this.think(choice.delta.reasoning);
    if (choice.delta.content) this.answer(choice.delta.content);
    if (choice.looktwice?.type === "crop") this.crop(choice.looktwice);
    if (choice.looktwice?.type === "trace") this.end(choice.looktwice);
  }

  think(text) {
    this.say("thinking");
    const thinking = this.find(".thinking");
    if (thinking.hidden) Object.assign(thinking, { hidden: false, open: true });
    this.find(".thinking p").append(text);
  }

  answer(text) {
    if (!this.content) this.find(".thinking").open = false;
    this.say("answering");
    this.content += text;
    this.find(".answer").append(text);
  }

  crop(crop) {
    this.numCrops += 1;
    this.say(`looks twice: crop ${this.numCrops}`);
    const item = element("li");
    if (crop.box) {
      const mark = this.mark(crop.image, crop.box, String(this.numCrops), "");
      const light = (isLit) => mark?.classList.toggle("lit", isLit);
      item.addEventListener("pointerenter", () => light(true));
      item.addEventListener("pointerleave", () => light(false));
      if (crop.image_url) item.append(element("img", { src: crop.image_url, alt: `crop ${this.numCrops}` }));
      item.append(`${this.numCrops}: ${crop.label ?? ""} [${crop.box.join(", ")}]`);
    } else {
      item.className = "refused";
      item.append(`${this.numCrops}: refused, ${crop.error}`);
    }
    this.find(".crops").append(item);
  }

  end(trace) {
    this.trace = trace;
    for (const place of trace.grounding) {
      if (place.coordinates) this.mark(1, place.coordinates, place.phrase, `found ${place.kind}`);
    }
    const seen = trace.picture ? `, seen at ${trace.picture.seen.join("×")}` : "";
    const reason = trace.stop_reason === "answered" ? "" : `, ended by ${trace.stop_reason}`;
    this.say(`${trace.tokens.written} tokens in ${trace.seconds.total.toFixed(1)} s${seen}${reason}`);
  }

  fail(message) {
    Object.assign(this.find(".problem"), { textContent: message, hidden: false });
    this.say("failed");
  }

  /** Show what can be done with an answer that is over. */
  offer(actions) {
    const buttons = this.find(".actions");
    buttons.hidden = false;
    for (const [name, act] of Object.entries(actions)) {
      const button = this.find(`.${name}`);
      button.onclick = async () => {
        const said = await act();
        if (said) this.say(said);
      };
    }
  }
}
