// The rank explorer: sliders, curves and numbers over a table of measured ranks.
//
// One front end for two hosts: anywidget calls `render` in a notebook, and the page that
// `to_html` writes calls it with a stand-in for the model. The table travels once; what
// it lacks is asked of Python (`request`, `answer`) or, in a page, predicted.

const TOLERANCE = 0.1; // of accuracy: a prediction that may be further off is not shown
const FEW = 60; // so many points are marked singly, more make a line

function make(parent, name, attributes = {}, text = "") {
  const inSvg = name === "svg" || parent.namespaceURI.endsWith("svg");
  const space = inSvg ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

const percent = (share) => `${(100 * share).toFixed(2)} %`;
const count = (number) => number.toLocaleString("en-US");

// Everything known about the network at any ranks, for any way of cutting it.
class Table {
  constructor(data) {
    Object.assign(this, data);
    this.whole = data.layers.map(({ ranks }) => ranks.at(-1));
    this.base = [data.key, data.refit];
    this.points = new Map();
    for (const point of data.points) this.add(this.base, point.slice(0, -2), point.slice(-2));
    // How far sums of losses are from the combinations that were measured.
    this.checks = [];
    this.lowest = 1;
    for (const [ranks, accuracy] of this.measured(this.base)) {
      this.lowest = Math.min(this.lowest, accuracy);
      const sum = this.cut(ranks).length > 1 ? this.added(ranks) : null;
      if (sum !== null) this.checks.push({ sum, miss: Math.abs(sum - accuracy) });
    }
  }

  add(how, ranks, [right, error]) {
    this.points.set([...how, ...ranks].join(), { accuracy: right / this.images, error });
  }

  find(how, ranks) {
    if (!this.cut(ranks).length) how = this.base; // the same, however it is cut
    return this.points.get([...how, ...ranks].join());
  }

  accuracy(how, ranks) {
    return this.find(how, ranks)?.accuracy ?? null;
  }

  // The layers that are not whole.
  cut(ranks) {
    return [...ranks.keys()].filter((place) => ranks[place] < this.whole[place]);
  }

  // Every measured network of one way of cutting: [ranks, accuracy].
  *measured(how) {
    const start = `${how.join()},`;
    for (const [key, { accuracy }] of this.points) {
      if (!key.startsWith(start)) continue;
      yield [key.slice(start.length).split(",").map(Number), accuracy];
    }
  }

  // One layer at each of its ranks, the others as in `ranks`: [rank, accuracy].
  along(how, place, ranks) {
    const steps = Array.from({ length: this.whole[place] }, (_, n) => n + 1);
    const points = steps.map((rank) => [rank, this.accuracy(how, ranks.with(place, rank))]);
    return points.filter(([, accuracy]) => accuracy !== null);
  }

  // All layers at each step of the first slider: [percent, accuracy].
  alike(how) {
    const points = this.steps.map(([at, ...ranks]) => [at, this.accuracy(how, ranks)]);
    return points.filter(([, accuracy]) => accuracy !== null);
  }

  parameters(ranks) {
    const inside = this.layers.map((layer, n) => layer.fixed + layer.component * ranks[n]);
    return inside.reduce((sum, part) => sum + part, this.other);
  }

  // Relative error of all kernels together: squares of what each layer adds to it.
  error(how, ranks) {
    const point = this.find(how, ranks);
    if (point) return point.error;
    const alone = this.cut(ranks).map((n) => this.find(how, this.whole.with(n, ranks[n])));
    return alone.includes(undefined) ? null : Math.hypot(...alone.map(({ error }) => error));
  }

  // The whole network less what each layer loses when it is cut alone.
  added(ranks) {
    const whole = this.accuracy(this.base, this.whole);
    const cut = this.cut(ranks).map((n) => this.whole.with(n, ranks[n]));
    const alone = cut.map((one) => this.accuracy(this.base, one));
    if (alone.includes(null)) return null;
    return Math.min(1, alone.reduce((sum, accuracy) => sum + accuracy - whole, whole));
  }

  // Such a sum, with the largest miss of those about as high; null if it says nothing.
  predict(how, ranks) {
    const sum = how.join() === this.base.join() ? this.added(ranks) : null;
    if (sum === null || sum <= this.lowest || !this.checks.length) return null;
    const near = Math.min(sum, Math.max(...this.checks.map((check) => check.sum)));
    const like = this.checks.filter((check) => check.sum >= near - TOLERANCE);
    const miss = Math.max(...like.map((check) => check.miss));
    return miss > TOLERANCE ? null : { accuracy: sum, miss };
  }

  // Measured networks that no other one beats in both size and accuracy.
  front(points) {
    const order = points.toSorted(([p, a], [q, b]) => p - q || b - a);
    let best = -1;
    return order.filter(([, accuracy]) => accuracy > best && ((best = accuracy), true));
  }
}

// Axes with curves, which stay, and a marker, which moves.
class Plot {
  constructor(parent, height, colours) {
    this.height = height;
    this.colour = colours.point;
    this.svg = make(parent, "svg", { role: "img", height });
    this.frame = make(this.svg, "g");
    this.position = make(this.svg, "path", { class: "position" });
    this.marker = make(this.svg, "circle", { r: 6, stroke: this.colour });
  }

  // Draw all that stays while one slider moves; `scene` tells whether it is the same.
  draw(scene, { x: [first, last], xLabel, curves, lines, small = false }) {
    const width = Math.max(160, this.svg.parentNode.clientWidth);
    scene = [...scene, width].join();
    if (scene === this.scene) return;
    this.scene = scene;
    const [left, top, floor] = [46, 12, this.height - (small ? 22 : 40)];
    const inner = width - left - 14;
    this.x = (value) => left + (inner * (value - first)) / (last - first || 1);
    this.y = (share) => floor - (floor - top) * share;
    this.position.setAttribute("d", `M0 ${top}V${floor}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("aria-label", `accuracy against ${xLabel}`);
    this.frame.replaceChildren();
    const write = (x, y, anchor, text) =>
      make(this.frame, "text", { x, y, "text-anchor": anchor }, text);
    for (const share of small ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]) {
      const y = this.y(share);
      make(this.frame, "path", { d: `M${left} ${y}h${inner}`, class: "grid" });
      write(left - 6, y + 4, "end", `${100 * share} %`);
    }
    for (const tick of ticks(first, last, width / 90)) {
      write(this.x(tick), floor + 16, "middle", +tick.toPrecision(6));
    }
    if (!small) write(left + inner / 2, this.height - 6, "middle", xLabel);
    for (const { at, text } of lines.filter(({ at }) => at <= last)) {
      const x = this.x(at);
      make(this.frame, "path", { d: `M${x} ${top}V${floor}`, class: "reference" });
      write(x - 5, floor - 7, "end", text);
    }
    for (const curve of curves()) this.curve(curve);
  }

  curve({ points, colour = "currentColor", kind = "line", faint = false }) {
    const at = points.map(([x, y]) => [this.x(x).toFixed(1), this.y(y).toFixed(1)]);
    const look = { stroke: colour, class: `curve ${kind} ${faint ? "faint" : ""}` };
    const join = kind === "steps" ? ([x, y]) => `H${x}V${y}` : ([x, y]) => `L${x} ${y}`;
    if (kind !== "dots") {
      const d = at.map(([x, y], n) => (n ? join([x, y]) : `M${x} ${y}`)).join("");
      make(this.frame, "path", { d, ...look });
    }
    const gaps = points.some(([x], n) => n && x - points[n - 1][0] > 1.001);
    if (kind === "dots" || (kind === "line" && (gaps || points.length < FEW))) {
      const d = at.map(([x, y]) => `M${x} ${y}h0`).join("");
      make(this.frame, "path", { d, ...look, class: `${look.class} points` });
    }
  }

  // Filled where the accuracy was measured, hollow where predicted, none if unknown.
  mark(x, accuracy, measured) {
    this.position.setAttribute("transform", `translate(${this.x(x).toFixed(1)} 0)`);
    this.marker.setAttribute("visibility", accuracy === null ? "hidden" : "visible");
    if (accuracy === null) return;
    this.marker.setAttribute("cx", this.x(x).toFixed(1));
    this.marker.setAttribute("cy", this.y(accuracy).toFixed(1));
    this.marker.setAttribute("fill", measured ? this.colour : "none");
  }
}

// Round numbers that part a range into at most about `most` steps.
function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const [first, last] = [Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9)];
  return Array.from({ length: last - first + 1 }, (_, n) => (first + n) * step);
}

function render({ model, el }) {
  const table = new Table(model.get("table"));
  const { layers, colours, live, notes } = table;
  // What is shown: the slider moved last ("*" for all layers), the way of cutting, ranks.
  const state = { axis: "*", how: table.base, ranks: table.whole };
  const same = (ranks, others) => ranks.join() === others.join();
  const here = ({ key, refit, ranks }) => same([key, refit, ranks], [...state.how, state.ranks]);
  let requests = model.get("request")?.number ?? 0;

  // The page, from top to bottom.
  const root = make(el, "div", { class: "cpnb-explorer" });
  const head = make(root, "p");
  make(head, "strong", {}, table.title);
  make(head, "span", {}, ` · ${table.subtitle}`);
  const percents = table.steps.map(([share]) => share);
  const all = slider(root, "all layers", notes.all, percents, (n) =>
    move("*", table.steps[n].slice(1), percents[n]),
  );
  const main = new Plot(make(root, "div"), 250, colours);
  const numbers = make(root, "p", { class: "numbers", role: "status", "aria-live": "polite" });

  const each = section("Each layer");
  make(each, "p", { class: "note" }, notes.layers);
  const rows = layers.map(({ name, ranks }, place) => {
    const row = make(each, "div", { class: "layer" });
    const moved = (n) => move(place, state.ranks.with(place, ranks[n]));
    const control = slider(row, name || "layer", notes.layer, ranks, moved);
    return { ...control, plot: new Plot(make(row, "div"), 84, colours) };
  });

  const cost = section("Accuracy against parameters");
  const spend = table.budgets.map(([share]) => share);
  const budget =
    spend.length > 0 &&
    slider(cost, "budget", notes.budget, spend, (n) =>
      move("budget", table.budgets[n].slice(1), spend[n]),
    );
  const pareto = new Plot(make(cost, "div"), 250, colours);
  const legend = make(cost, "p", { class: "note" });
  for (const [look, stroke, d, text] of [
    ["knob", colours.point, "M14 6h0", "this network (hollow: predicted)"],
    ["steps", colours.front, "M2 6h24", "the best measured"],
    ["dashed", colours.front, "M2 6h24", "what the budget buys, predicted"],
    ["dots faint", "currentColor", "M4 6h0m10 0h0m10 0h0", "all measured"],
  ]) {
    const entry = make(legend, "span", { class: "key" });
    make(make(entry, "svg"), "path", { d, stroke, class: `curve ${look}` });
    make(entry, "span", {}, text);
  }

  const cut = section("What is cut");
  make(cut, "p", { class: "note" }, notes.cut);
  const menus = (live ? ["key", "refit"] : []).map((name, part) => {
    const options = table.choices[name];
    const label = make(cut, "label", { title: notes[name] }, `${name} `);
    const menu = make(label, "select", { "aria-label": name });
    for (const [value, text] of options) make(menu, "option", { value }, text);
    menu.addEventListener("change", () => {
      state.how = state.how.with(part, options[menu.selectedIndex][0]);
      move(state.axis, state.ranks, state.value);
    });
    return menu;
  });

  const pictures = live && section("Pictures");
  const picture = pictures && make(pictures, "img", { alt: "not drawn yet" });
  const words = pictures && make(pictures, "p", { class: "note" });
  if (pictures) pictures.addEventListener("toggle", () => ask());

  const foot = make(root, "p", { class: "foot" });
  const copy = button("Copy as code", notes.code, () => {
    code.hidden = !code.hidden;
    copy.setAttribute("aria-expanded", !code.hidden);
    show();
    if (code.hidden) return;
    code.select();
    navigator.clipboard?.writeText(code.value).catch(() => {}); // it is selected as well
  });
  button("Reset", notes.reset, () => move("*", table.whole, 100));
  copy.setAttribute("aria-expanded", false);
  const code = make(root, "textarea", { readonly: "", rows: 5, "aria-label": "code" });
  code.hidden = true;
  // JupyterLab takes the arrow keys of whatever has the focus, unless told so.
  for (const each of root.querySelectorAll("input, select, summary, button, textarea")) {
    each.dataset.lmSuppressShortcuts = "true";
  }

  function section(name) {
    const details = make(root, "details");
    make(details, "summary", { title: notes[name] }, name);
    details.addEventListener("toggle", () => show());
    return details;
  }

  function button(name, tip, pressed) {
    const element = make(foot, "button", { type: "button", title: tip }, name);
    element.addEventListener("click", pressed);
    return element;
  }

  // A slider over positions, ascending; `set` moves it to the first not below.
  function slider(parent, name, tip, positions, moved) {
    const label = make(parent, "label", { class: "row", title: tip });
    make(label, "span", { class: "name" }, name);
    const range = { type: "range", min: 0, max: positions.length - 1, "aria-label": name };
    const input = make(label, "input", range);
    const output = make(label, "span", { class: "place" });
    input.addEventListener("input", () => moved(Number(input.value)));
    const set = (position, text) => {
      const place = positions.findIndex((each) => each >= position);
      const value = place < 0 ? positions.length - 1 : place;
      if (Number(input.value) !== value) input.value = value;
      output.textContent = text;
      input.setAttribute("aria-valuetext", text);
    };
    return { set };
  }

  // `value` is where the slider stands, as several positions can give the same ranks.
  function move(axis, ranks, value) {
    Object.assign(state, { axis, ranks, value, failure: "" });
    show();
    ask();
  }

  // Tell Python where we are; it answers what the table lacks.
  function ask() {
    if (!live) return;
    const [key, refit] = state.how;
    const layer = Number.isInteger(state.axis) ? state.axis : 0;
    const request = { key, refit, ranks: state.ranks, layer: pictures.open ? layer : null };
    model.set("request", { ...request, number: ++requests });
    model.save_changes();
  }

  function show() {
    const { axis, how, ranks, value } = state;
    const measured = table.accuracy(how, ranks);
    const guess = measured === null ? table.predict(how, ranks) : null;
    const mark = [measured ?? guess?.accuracy ?? null, measured !== null];
    const parameters = table.parameters(ranks);
    const ratio = parameters / table.dense;
    const found = table.steps.find(([, ...step]) => same(step, ranks));
    const uniform = (axis === "*" && value) || found?.[0];
    const sum = (numbers) => numbers.reduce((total, rank) => total + rank, 0);
    const share = uniform ?? (100 * sum(ranks)) / sum(table.whole);
    const kept = uniform === undefined ? "by layer" : `keep ${uniform} %`;
    all.set(share, `${kept}: ${count(parameters)} parameters`);
    drawMain(share, mark);
    const error = table.error(how, ranks)?.toFixed(3) ?? "unknown";
    numbers.textContent =
      `${accuracyWords(measured, guess)} · parameters ${ratio.toFixed(2)} × dense · ` +
      `kernel error ${error}`;
    for (const [place, { set, plot }] of rows.entries()) {
      const { break_even } = layers[place];
      const even = (ranks[place] / break_even).toFixed(2);
      set(ranks[place], `rank ${ranks[place]} of ${table.whole[place]}, ${even} × break-even`);
      if (each.open) drawLayer(place, plot);
    }
    const spent = axis === "budget" ? value : 100 * ratio - 1e-9;
    if (budget) budget.set(spent, `${(100 * ratio).toFixed(1)} % of dense`);
    if (cost.open) drawPareto(ratio, mark);
    menus.forEach((menu, part) => (menu.value = how[part]));
    code.value = code.hidden ? "" : callOf(measured);
  }

  function accuracyWords(measured, guess) {
    const whole = percent(table.accuracy(table.base, table.whole));
    if (measured !== null) return `Accuracy ${percent(measured)} measured (whole: ${whole})`;
    if (state.failure) return state.failure;
    const words = live ? "Accuracy: measuring…" : "Accuracy not measured";
    if (!guess) return words;
    return `${words}, predicted ${percent(guess.accuracy)} ± ${(100 * guess.miss).toFixed(1)}`;
  }

  function drawMain(share, mark) {
    const { axis, how, ranks } = state;
    const one = Number.isInteger(axis);
    const curve = (way, at) => (one ? table.along(way, axis, at) : table.alike(way));
    // Beside it what the table holds, where that is another curve.
    const alone = !one || table.cut(ranks).every((place) => place === axis);
    const two = !alone || !same(how, table.base);
    const curves = () => [
      { points: curve(how, ranks), colour: colours[how.join()] },
      { points: two ? curve(table.base, table.whole) : [], kind: "dashed", faint: true },
    ];
    const dashed = two ? " (dashed: as in the table)" : "";
    const rest = table.parameters(layers.map(() => 0));
    const even = (table.dense - rest) / (table.parameters(table.whole) - rest);
    main.draw([how, table.points.size, axis, ...(one ? ranks.with(axis, "*") : [])], {
      x: [0, one ? table.whole[axis] : 100],
      xLabel: (one ? `rank of ${layers[axis].name || "layer"}` : notes.share) + dashed,
      curves,
      lines: [{ at: one ? layers[axis].break_even : 100 * even, text: "break-even" }],
    });
    main.mark(one ? ranks[axis] : share, ...mark);
  }

  function drawLayer(place, plot) {
    const points = () => table.along(table.base, place, table.whole);
    plot.draw([table.points.size], {
      x: [0, table.whole[place]],
      xLabel: `rank of ${layers[place].name || "layer"}, cut alone`,
      curves: () => [{ points: points(), colour: colours[table.base.join()] }],
      lines: [{ at: layers[place].break_even, text: "" }],
      small: true,
    });
    const alone = table.whole.with(place, state.ranks[place]);
    plot.mark(state.ranks[place], table.accuracy(table.base, alone), true);
  }

  function drawPareto(ratio, mark) {
    const { how } = state;
    const sized = ([ranks, accuracy]) => [table.parameters(ranks) / table.dense, accuracy];
    const curves = () => {
      const points = [...table.measured(how)].map(sized);
      const budgets = same(how, table.base) ? table.budgets : [];
      const bought = budgets.map(([, ...ranks]) => sized([ranks, table.added(ranks)]));
      const above = bought.filter(([, accuracy]) => accuracy > table.lowest);
      return [
        { points, kind: "dots", faint: true },
        { points: table.front(points), kind: "steps", colour: colours.front },
        { points: above, kind: "dashed", colour: colours.front },
      ];
    };
    pareto.draw([how, table.points.size], {
      x: [0, 1.04 * Math.max(1, table.parameters(table.whole) / table.dense)],
      xLabel: "parameters of the network ÷ dense",
      curves,
      lines: [{ at: 1, text: "dense" }],
    });
    pareto.mark(ratio, ...mark);
  }

  function callOf(measured) {
    const [key, refit] = state.how;
    const pairs = layers.map(({ name }, n) => `${JSON.stringify(name)}: ${state.ranks[n]}`);
    const python = { false: "False", true: "True" }[refit] ?? JSON.stringify(refit);
    const data = table.needs_data.includes(key) || refit === "data" ? ", data=data" : "";
    return (
      `import cpnb\n\nrank = {${pairs.join(", ")}}\n` +
      `cut = cpnb.truncate(net, rank=rank, key="${key}", refit=${python}${data})\n` +
      `cpnb.accuracy(cut, data)  # ${measured === null ? "not measured" : percent(measured)}`
    );
  }

  function answered() {
    const answer = model.get("answer");
    const { key, refit, ranks, right, error, failure, image, text } = answer;
    if (right !== undefined) table.add([key, refit], ranks, [right, error]);
    if (here(answer) && failure) state.failure = words.textContent = failure;
    if (here(answer) && image) {
      picture.src = image;
      picture.alt = words.textContent = text;
    }
    show();
  }

  // Python, or another view of the same explorer, has moved.
  function adopt() {
    const request = model.get("request");
    if (here(request)) return;
    const { key, refit, ranks } = request;
    Object.assign(state, { axis: "*", how: [key, refit], ranks, value: 0, failure: "" });
    show();
  }

  model.on("change:answer", answered);
  model.on("change:request", adopt);
  const resized = new ResizeObserver(() => show());
  resized.observe(root);
  if (live) adopt();
  if (table.accuracy(state.how, state.ranks) === null) ask(); // drawn after it has moved
  return () => {
    resized.disconnect();
    model.off("change:answer", answered);
    model.off("change:request", adopt);
    root.remove();
  };
}

export default { render };
