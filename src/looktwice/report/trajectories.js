// The list of rollouts: filter, order, and how each is shown.
"use strict";
(() => {
  const rollouts = data.groups.flatMap((group) => group.rollouts.map((one) => Object.assign(one, { of: group })));
  const largest = Math.max(1e-9, ...rollouts.map((one) => Math.abs(one.advantage)));
  const form = document.getElementById("filter");
  const list = document.getElementById("list");
  const count = document.getElementById("count");

  const ORDERS = {
    step: (one) => -one.of.step,
    earliest: (one) => one.of.step,
    best: (one) => -(one.reward ?? -Infinity),
    worst: (one) => one.reward ?? Infinity,
    advantage: (one) => -Math.abs(one.advantage),
    calls: (one) => -one.calls.length,
    longest: (one) => -one.tokens,
    gap: (one) => -(one.gap ?? -1),
  };
  const steps = [...new Set(data.groups.map((group) => group.step))];
  offer(form.elements.step, [["", "all"], ...steps.map((step) => [step, `step ${step}`])]);
  const ends = [...new Set(rollouts.map((one) => one.stop))].sort();
  offer(form.elements.stop, [["", "any"], ...ends.map((end) => [end, end.replaceAll("_", " ")])]);

  const matches = (one, wanted) =>
    (!wanted.verdict || { right: one.right, wrong: !one.right && one.answer, none: !one.answer }[wanted.verdict]) &&
    (!wanted.calls || (wanted.calls === "3" ? one.calls.length > 2 : one.calls.length === +wanted.calls)) &&
    (!wanted.step || one.of.step === +wanted.step) &&
    (!wanted.stop || one.stop === wanted.stop) &&
    (wanted.least === "" || (one.reward ?? -Infinity) >= +wanted.least) &&
    (wanted.most === "" || (one.reward ?? Infinity) <= +wanted.most) &&
    (!wanted.words || searched(one).includes(wanted.words.toLowerCase()));
  const searched = (one) =>
    (one.searched ??= [one.of.question, one.of.gold, one.of.where, one.answer ?? "", plain(one)].join("\n").toLowerCase());
  const plain = (one) => one.text.map((run) => (run.said ? run.said.join("") : run.put ?? "")).join("");

  const gapWords = (level) => (level ? `about ${(1e-6 * 10 ** ((level - 1) * 0.75)).toExponential(0)} nats` : "none");
  const token = (run, place) => {
    const piece = run.said[place];
    if (!run.sure) return piece;
    const level = +(run.gap?.[place] ?? 0);
    const title = `probability ${run.sure[place]} %${run.gap ? `, gap ${gapWords(level)}` : ""}`;
    return make("span", { class: "tk", title, style: { "--gap": level / 9, "--doubt": 1 - run.sure[place] / 100 } }, piece);
  };

  // Text and crops of a rollout in order; a crop is the next call that was cut.
  const told = (one) => {
    const cut = one.calls.map((call, place) => [call, place]).filter(([call]) => call.box);
    const advantage = { "--advantage": Math.abs(one.advantage) / largest };
    let text = make("p", { class: "written", style: advantage });
    const parts = [text];
    for (const run of one.text) {
      if (run.crop) {
        const [call, place] = cut.shift() ?? [];
        text = make("p", { class: "written", style: advantage });
        parts.push(call ? cropOf(call, place, one.of) : make("span", { class: "chip" }, "crop"), text);
      } else if (run.put) {
        text.append(make("span", { class: "put" }, run.put));
      } else {
        text.append(make("span", { class: one.advantage < 0 ? "said bad" : "said good" }, ...run.said.map((_, at) => token(run, at))));
      }
    }
    parts.push(...cut.map(([call, place]) => cropOf(call, place, one.of)));
    return make("div", { class: "said" }, parts);
  };
  const cropOf = (call, place, group) => {
    const of = group.images.length > 1 ? ` of picture ${call.image}` : "";
    const caption = `crop ${place + 1}${of}: ${boxText(call.box)}, seen as ${call.size.join(" x ")}`;
    return framed(call.crop, { size: call.size, caption, isCrop: true, alt: caption });
  };

  const paid = (one) => {
    const rows = [["reward", one.failed ? "failed" : one.reward.toFixed(3)]];
    rows.push(...data.terms.filter((name) => name in one.parts).map((name) => [name, one.parts[name].toFixed(3)]));
    rows.push(["advantage", signed(one.advantage, 3)], ["calls", `${one.calls.length}`], ["tokens", `${one.tokens}`]);
    if (one.gap != null) rows.push(["largest gap", one.gap.toExponential(1)]);
    rows.push(["end", one.stop.replaceAll("_", " ")]);
    rows.push(...one.calls.filter((call) => call.error).map((call) => ["refused call", call.error.replaceAll("_", " ")]));
    if (one.failed || one.error) rows.push(["error", one.failed ?? one.error]);
    return make("table", {}, rows.map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value))));
  };
  const judged = (one) => verdict(one.right, one.answer ? `${one.answer} is ${one.right ? "right" : "wrong"}` : "no answer");

  const images = (group, shown) =>
    make(
      "div",
      { class: "pictures" },
      group.images.map((number, at) => {
        const gold = at ? [] : group.goldBoxes.map((box) => ({ box, gold: true }));
        const cut = shown.flatMap((one) =>
          one.calls.flatMap((call, place) =>
            call.box && call.image === at + 1
              ? [{ box: call.box, label: shown.length > 1 ? `${one.n}.${place + 1}` : `${place + 1}` }]
              : [],
          ),
        );
        const caption = `${group.names[at]}, ${group.sizes[at].join(" x ")}`;
        return framed(number, { size: group.sizes[at], boxes: [...gold, ...merged(cut)], caption, alt: caption });
      }),
    );
  const head = (group, words) =>
    make(
      "header",
      {},
      make("h2", {}, words),
      make("p", { class: "asked" }, group.question, make("small", {}, ` Gold answer: ${group.gold}`)),
      make("p", { class: "note" }, group.where),
    );
  const sibling = (one, wanted) =>
    make(
      "section",
      { class: wanted && !matches(one, wanted) && "other" },
      make("h3", {}, `rollout ${one.n}`),
      judged(one),
      told(one),
      paid(one),
    );
  const columns = (group, wanted) => make("div", { class: "siblings" }, group.rollouts.map((one) => sibling(one, wanted)));

  const card = (one) => {
    const group = one.of;
    const beside = make("div");
    const open = make("button", { type: "button", onclick: () => (beside.append(columns(group)), open.remove()) },
      `all ${group.rollouts.length} rollouts of the group side by side`);
    return make(
      "article",
      { class: "card" },
      head(group, `Step ${group.step}, group ${group.group + 1}, rollout ${one.n}`),
      make("div", { class: "rollout" }, images(group, [one]), make("div", {}, judged(one), told(one)), paid(one)),
      group.rollouts.length > 1 ? open : null,
      beside,
    );
  };
  const groupCard = (group, wanted) =>
    make(
      "article",
      { class: "card" },
      head(group, `Step ${group.step}, group ${group.group + 1}`),
      images(group, group.rollouts),
      columns(group, wanted),
    );

  filter(form, (wanted) => {
    document.body.dataset.colour = wanted.colour;
    const key = ORDERS[wanted.order];
    const found = rollouts.filter((one) => matches(one, wanted)).map((one) => [key(one), one]);
    found.sort(([ours], [theirs]) => (ours < theirs ? -1 : ours > theirs ? 1 : 0));
    const chosen = found.map(([, one]) => one);
    const right = chosen.filter((one) => one.right).length;
    count.textContent = `${chosen.length.toLocaleString("en")} of ${rollouts.length.toLocaleString("en")} rollouts, ${right.toLocaleString("en")} right`;
    if (wanted.view === "groups") fill(list, [...new Set(chosen.map((one) => one.of))], (group) => groupCard(group, wanted));
    else fill(list, chosen, card);
  });
})();
