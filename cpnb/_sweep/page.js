// The rank explorer of a page: sliders, pictures and words from the table inside it.
// Runs without a server, a kernel or the network.
(() => {
  "use strict";

  const WIDTH = 330;
  const HEIGHT = 250;
  const LEFT = 48;
  const RIGHT = 12;
  const TOP = 30;
  const BOTTOM = 42;

  function element(parent, name, attributes = {}, text = "") {
    const space = "http://www.w3.org/2000/svg";
    const svg = name === "svg" || parent.namespaceURI === space;
    const made = svg
      ? document.createElementNS(space, name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      made.setAttribute(key, value);
    }
    made.textContent = text;
    parent.append(made);
    return made;
  }

  // Round numbers that part a range into at most five.
  function ticks(low, high) {
    const rough = (high - low) / 5 || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    const first = Math.ceil(low / step - 1e-9);
    const last = Math.floor(high / step + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, n) => (first + n) * step);
  }

  // Axes with a curve and a marker; the marker alone moves from step to step.
  class Panel {
    constructor(parent, colour, yLabel) {
      this.svg = element(parent, "svg", {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        role: "img",
      });
      this.name = element(this.svg, "title");
      this.frame = element(this.svg, "g");
      this.curve = element(this.svg, "path", {
        fill: "none",
        stroke: colour,
        "stroke-width": 1.6,
      });
      this.dots = element(this.svg, "path", {
        fill: "none",
        stroke: colour,
        "stroke-width": 4,
        "stroke-linecap": "round",
      });
      this.marker = element(this.svg, "circle", {
        r: 6,
        fill: "#e69f00",
        stroke: "black",
        "stroke-width": 1.4,
      });
      this.heading = element(this.svg, "text", { x: LEFT, y: 18, class: "heading" });
      this.yLabel = yLabel;
    }

    // Draw everything that stays while one slider moves.
    draw({ points, others = [], xRange, yRange, xLabel, lines = [] }) {
      const [x0, x1] = xRange;
      const [y0, y1] = yRange;
      const inner = [WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
      this.x = (value) => LEFT + (inner[0] * (value - x0)) / (x1 - x0 || 1);
      this.y = (value) => TOP + inner[1] - (inner[1] * (value - y0)) / (y1 - y0 || 1);
      this.points = points;
      this.frame.replaceChildren();
      const bottom = HEIGHT - BOTTOM;
      for (const tick of ticks(y0, y1)) {
        const y = this.y(tick);
        element(this.frame, "path", { d: `M${LEFT} ${y}H${WIDTH - RIGHT}`, class: "grid" });
        this.write(LEFT - 6, y + 4, "end", +tick.toPrecision(6));
      }
      for (const tick of ticks(x0, x1)) {
        this.write(this.x(tick), bottom + 16, "middle", +tick.toPrecision(6));
      }
      element(this.frame, "path", {
        d: `M${LEFT} ${TOP}V${bottom}H${WIDTH - RIGHT}`,
        class: "axis",
      });
      for (const { at, word } of lines) {
        if (at < x0 || at > x1) continue;
        element(this.frame, "path", { d: `M${this.x(at)} ${TOP}V${bottom}`, class: "line" });
        this.write(this.x(at) - 4, bottom - 6, "end", word);
      }
      const name = element(this.frame, "text", {
        x: LEFT + inner[0] / 2,
        y: HEIGHT - 8,
        "text-anchor": "middle",
      });
      name.textContent = xLabel;
      const path = (pairs, start, next) =>
        pairs.map(([x, y], n) => `${n ? next : start}${this.x(x)} ${this.y(y)}`).join("");
      element(this.frame, "path", {
        d: others.map(([x, y]) => `M${this.x(x)} ${this.y(y)}h0`).join(""),
        class: "others",
      });
      this.curve.setAttribute("d", path(points, "M", "L"));
      this.dots.setAttribute(
        "d",
        points.length > 60 && points.every(([x], n) => !n || x - points[n - 1][0] <= 1)
          ? ""
          : points.map(([x, y]) => `M${this.x(x)} ${this.y(y)}h0`).join(""),
      );
      this.name.textContent = `${this.yLabel} against ${xLabel}`;
    }

    write(x, y, anchor, text) {
      element(this.frame, "text", { x, y, "text-anchor": anchor }, text);
    }

    move(step, words) {
      const [x, y] = this.points[step];
      this.marker.setAttribute("cx", this.x(x));
      this.marker.setAttribute("cy", this.y(y));
      this.heading.textContent = words;
    }
  }

  function explore(root) {
    const table = JSON.parse(root.querySelector("script").textContent);
    const controls = root.querySelector(".controls");
    const pictures = root.querySelector(".pictures");
    const status = root.querySelector("[role=status]");
    const axes = table.axes.map((axis) => ({
      ...axis,
      accuracies: axis.accuracy.map(Number),
      errors: axis.error.map(Number),
    }));
    const everything = axes.flatMap((axis) =>
      axis.parameters.map((count, n) => [count / table.dense, axis.accuracies[n]]),
    );
    const largest = Math.max(1, ...everything.map(([size]) => size));
    const accuracy = new Panel(pictures, "#0072b2", "accuracy in percent");
    const error = new Panel(pictures, "#d55e00", "relative kernel error");
    const size = new Panel(pictures, "#009e73", "accuracy in percent");
    let present = null;

    function redraw(axis) {
      const pairs = (values) => values.map((value, n) => [axis.at[n], value]);
      const shared = { xRange: [0, axis.last], xLabel: axis.x_label, lines: [] };
      if (axis.break_even !== null) {
        shared.lines.push({ at: axis.break_even, word: "break-even" });
      }
      accuracy.draw({ ...shared, points: pairs(axis.accuracies), yRange: [0, 100] });
      error.draw({
        ...shared,
        points: pairs(axis.errors),
        yRange: [0, Math.max(1, ...axis.errors)],
      });
      size.draw({
        points: axis.parameters.map((n, i) => [n / table.dense, axis.accuracies[i]]),
        others: everything,
        xRange: [0, largest],
        yRange: [0, 100],
        xLabel: "parameters of the network ÷ dense",
        lines: [{ at: 1, word: "dense" }],
      });
    }

    function show(axis) {
      const step = Number(axis.slider.value);
      if (axis !== present) {
        for (const other of axes) {
          if (other !== axis) settle(other, other.at.length - 1);
        }
        redraw((present = axis));
      }
      settle(axis, step);
      accuracy.move(step, `accuracy ${axis.accuracy[step]} %`);
      error.move(step, `kernel error ${axis.error[step]}`);
      const share = (axis.parameters[step] / table.dense).toFixed(2);
      size.move(step, `accuracy ${axis.accuracy[step]} % at ${share} × dense`);
      status.replaceChildren();
      for (const line of words(table, axis, step)) element(status, "div", {}, line);
    }

    for (const axis of axes) {
      const row = element(controls, "label");
      element(row, "span", { class: "name" }, axis.label);
      axis.slider = element(row, "input", {
        type: "range",
        min: 0,
        max: axis.at.length - 1,
        step: 1,
        "aria-label": axis.label,
      });
      axis.output = element(row, "span", { class: "place" });
      settle(axis, axis.at.length - 1);
      axis.slider.addEventListener("input", () => show(axis));
    }
    show(axes[axes.length - 1]);
  }

  function settle(axis, step) {
    axis.slider.value = step;
    const place = axis.place.replace("{}", axis.at[step]);
    axis.output.textContent = place;
    axis.slider.setAttribute("aria-valuetext", place);
  }

  function words(table, axis, step) {
    const count = (n) => n.toLocaleString("en-US");
    const loss = axis.loss[step] === null ? "" : `, loss ${axis.loss[step]}`;
    const parameters = axis.parameters[step];
    const ratio = parameters / table.dense;
    const saving =
      parameters < table.dense
        ? `compression ${(table.dense / parameters).toFixed(2)}`
        : "no compression";
    return [
      `Accuracy ${axis.accuracy[step]} %${loss} on ${table.images}; untruncated ` +
        `${table.whole} %.`,
      `${sentence(axis, step)}; relative kernel error ${axis.error[step]}.`,
      `Network: ${count(parameters)} parameters, ${ratio.toFixed(2)} × dense ` +
        `(${count(table.dense)}), ${saving}; ${count(axis.flops[step])} FLOPs for one ` +
        `image as chains, dense ${count(table.dense_flops)}.`,
    ];
  }

  function sentence(axis, step) {
    const at = axis.at[step];
    if (axis.break_even === null) return `All layers keep ${at} % of their components`;
    const share = (at / axis.break_even).toFixed(2);
    return (
      `${axis.label}: rank ${at} of ${axis.last}, ${share} × break-even rank ` +
      `${axis.break_even}, all other layers whole`
    );
  }

  for (const root of document.querySelectorAll(".cpnb-sweep:not([data-ready])")) {
    root.dataset.ready = "yes";
    explore(root);
  }
})();
