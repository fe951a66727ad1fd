// The list of questions of evaluations: filter, order, and how each is shown.
"use strict";
(() => {
  const form = document.getElementById("filter");
  const list = document.getElementById("list");
  const count = document.getElementById("count");
  const WITH_CROPS = "crops";

  const ORDERS = {
    differing: (item) => [-item.spread, item.mean, item.order],
    wrong: (item) => [item.mean, item.order],
    calls: (item) => [-Math.max(...own(item).map((one) => one.calls.length), 0), item.order],
    file: (item) => [item.order],
  };
  const own = (item) => item.answers.filter((one) => one.condition === WITH_CROPS);
  const rights = (item, number) => own(item).filter((one) => one.result === number && one.right).length;
  const asked = (item, number) => own(item).filter((one) => one.result === number).length;
  const isRight = (item, number) => asked(item, number) > 0 && rights(item, number) * 2 > asked(item, number);

  const verdicts = [["", "all"], ["wrong", "wrong"], ["right", "right"]];
  if (data.names.length > 1) {
    verdicts.push(["differ", "answered differently"]);
    data.names.forEach((name, number) => verdicts.push([`${number}`, `only ${name} right`]));
  }
  offer(form.elements.verdict, verdicts);
  const benches = [...new Set(data.items.map((item) => item.bench))];
  offer(form.elements.bench, [["", "all"], ...benches.map((name) => [name, name])]);
  const categories = [...new Set(data.items.map((item) => item.category))].filter(Boolean).sort();
  offer(form.elements.category, [["", "all"], ...categories.map((name) => [name, name])]);

  const judged = (item, wanted) => {
    const right = data.names.map((_, number) => isRight(item, number));
    if (wanted === "right") return right.every(Boolean);
    if (wanted === "wrong") return !right.every(Boolean);
    if (wanted === "differ") return item.spread > 0;
    return right[+wanted] && right.filter(Boolean).length === 1;
  };
  const searched = (item) =>
    (item.searched ??= [item.about, item.id, ...item.gold, ...item.answers.map((one) => one.said ?? "")].join("\n").toLowerCase());
  const matches = (item, wanted) =>
    (!wanted.verdict || judged(item, wanted.verdict)) &&
    (!wanted.bench || item.bench === wanted.bench) &&
    (!wanted.category || item.category === wanted.category) &&
    (!wanted.words || searched(item).includes(wanted.words.toLowerCase()));

  const verdictOf = (one) => {
    const said = one.said ?? "no answer found";
    if (one.score == null) return make("p", { class: "note" }, `${said}: undecided`);
    const score = one.score > 0 && one.score < 1 ? `, score ${one.score.toFixed(2)}` : "";
    return verdict(one.right, one.said == null ? `${said}${score}` : `${said} is ${one.right ? "right" : "wrong"}${score}`);
  };

  const cropOf = (call, place, item) => {
    const caption = `crop ${place + 1}${item.sizes.length > 1 ? ` of picture ${call.image}` : ""}: ${boxText(call.box)}, seen as ${call.size.join(" x ")}`;
    return framed(call.crop, { size: call.size, caption, isCrop: true, alt: caption });
  };
  // Passages in order, each call as its crop, or as it was written where it was refused.
  const told = (one, item) => {
    let place = 0;
    const parts = one.parts.map(([kind, text]) => {
      if (kind !== "call") return kind === "answer" ? null : make("p", { class: kind }, text);
      const call = one.calls[place++];
      if (call?.box) return cropOf(call, place - 1, item);
      return make("p", { class: "call" }, `asks for ${text}${call?.error ? `, refused: ${call.error.replaceAll("_", " ")}` : ""}`);
    });
    return make("div", { class: "said" }, parts);
  };

  const images = (item) =>
    make(
      "div",
      { class: "pictures" },
      item.images.map((number, at) => {
        const gold = at ? [] : item.goldBoxes.map((box) => ({ box, gold: true }));
        const cut = own(item).flatMap((one) =>
          one.calls.flatMap((call, place) =>
            call.box && call.image === at + 1
              ? [{ box: call.box, label: data.names.length > 1 ? `${data.names[one.result]} ${place + 1}` : `${place + 1}` }]
              : [],
          ),
        );
        const caption = `picture${item.images.length > 1 ? ` ${at + 1}` : ""}, ${(item.sizes[at] ?? []).join(" x ")}`;
        return framed(number, { size: item.sizes[at], boxes: [...gold, ...merged(cut)], caption, alt: caption });
      }),
    );
  const options = (item) =>
    item.options.length
      ? make("ol", { class: "options", type: "A" }, item.options.map((text, place) =>
          make("li", { class: item.gold.includes("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place]) && "right" }, text)))
      : null;

  const controls = (item) => {
    const conditions = Object.keys(data.words).filter((name) => name !== WITH_CROPS && item.answers.some((one) => one.condition === name));
    if (!conditions.length) return null;
    const cell = (name, number) =>
      item.answers
        .filter((one) => one.condition === name && one.result === number)
        .map((one) => make("details", {}, make("summary", { class: one.right ? "right" : "wrong" }, one.said ?? "no answer found"), make("p", { class: "plain" }, one.text)));
    return make(
      "details",
      {},
      make("summary", {}, `${conditions.length} controls`),
      make("table", { class: "controls" },
        data.names.length > 1 ? make("tr", {}, make("th"), data.names.map((name) => make("th", { scope: "col" }, name))) : null,
        conditions.map((name) =>
          make("tr", {}, make("th", { scope: "row" }, data.words[name]), data.names.map((_, number) => make("td", {}, cell(name, number)))))),
    );
  };

  const card = (item) =>
    make(
      "article",
      { class: "card" },
      make("header", {},
        make("h2", {}, [item.bench, item.id, item.category].filter(Boolean).join(", ")),
        make("p", { class: "asked" }, item.about, make("small", {}, ` Gold answer: ${item.gold.join(" or ")}`)),
        make("p", { class: "note" }, item.where)),
      make("div", { class: "item" },
        images(item),
        make("div", {}, options(item),
          make("div", { class: "replies" }, own(item).map((one) =>
            make("section", {},
              data.names.length > 1 || one.sample ? make("h3", {}, data.names[one.result], one.sample ? make("small", {}, ` sample ${one.sample + 1}`) : null) : null,
              verdictOf(one), told(one, item)))),
          controls(item))),
    );

  filter(form, (wanted) => {
    const key = ORDERS[wanted.order];
    const found = data.items.filter((item) => matches(item, wanted)).map((item) => [key(item), item]);
    found.sort(([ours], [theirs]) => ours.map((one, at) => one - theirs[at]).find(Boolean) ?? 0);
    count.textContent = `${found.length.toLocaleString("en")} of ${data.items.length.toLocaleString("en")} questions`;
    fill(list, found.map(([, item]) => item), card);
  });
})();
