// What a report adds to its charts where scripts run: another axis, smoothing, and the values under the pointer.
// The charts are there without it (evals/charts.py, whose arithmetic this repeats for the axes that a reader chooses).
"use strict";
(() => {
  const SIDE = 1000;
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);
  const controls = document.getElementById("controls");
  if (!controls) return;
  controls.hidden = false;
  const chosen = (name) => controls.elements[name];
  // A run that went on with another batch size has several stretches of steps; before the first one nothing is recorded.
  const tokensAt = (stretches, step) => {
    const found = stretches.filter(([from]) => from <= step).pop();
    if (found) return found[1] + (step - found[0]) * found[2];
    return (stretches[0][1] * step) / stretches[0][0];
  };
  const xOf = (run, step) => (chosen("axis").value === "tokens" ? tokensAt(data.runs[run].stretches, step) : step);

  function short(value) {
    for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= unit) return String(Number((value / unit).toPrecision(4))) + letter;
    return String(Number(value.toPrecision(4)));
  }

  function ticks(low, high, atMost) {
    const rough = (high - low) / atMost;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough * (1 - 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
    return found;
  }

  // Exponents of ten, or with few of them also 2 and 5 times; the axis is in logarithms.
  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power++)
      for (const factor of high - low < 2 ? [1, 2, 5] : [1]) {
        const place = power + Math.log10(factor);
        if (place >= low && place <= high) found.push(place);
      }
    return found.length > 1 ? found : ticks(low, high, 4);
  }

  function smoothed(points, weight) {
    let mean = 0, norm = 0;
    return points.map(([step, value]) => {
      if (value === null) return [step, null];
      mean = weight * mean + (1 - weight) * value;
      norm = weight * norm + (1 - weight);
      return [step, mean / norm];
    });
  }

  function line(points, x, y) {
    let d = "", down = false;
    points.forEach(([at, value], i) => {
      if (value === null) { down = false; return; }
      const alone = !down && (i + 1 === points.length || points[i + 1][1] === null);
      d += `${down ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}${alone ? "h0" : ""}`;
      down = true;
    });
    return d;
  }

  function labels(box, places, side) {
    box.replaceChildren(...places.map(([percent, text]) => {
      const span = document.createElement("span");
      span.style[side] = `${percent}%`;
      span.textContent = text;
      return span;
    }));
  }

  function redraw(figure) {
    const chart = data.charts[figure.dataset.key], svg = figure.querySelector("svg");
    if (!svg) return;
    const weight = chart.may_be_smoothed ? Number(chosen("smoothing").value) : 0, scaleX = (run, step) => xOf(run, step);
    const curves = chart.curves.map((curve) =>
      (curve.dotted || weight === 0 ? curve.points : smoothed(curve.points, weight)));
    const positive = curves.every((points) => points.every(([, value]) => value === null || value > 0));
    const log = chosen("log").checked && chart.may_be_log && positive;
    const height = (value) => (log ? Math.log10(value) : value);
    const values = curves.flat().map(([, value]) => value).filter((value) => value !== null).map(height);
    let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    if (chart.from_zero) low = Math.min(0, low);
    const pad = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
    if (!(chart.from_zero && low === 0)) low -= pad;
    high += pad;
    const end = Math.max(...data.runs.map((_, run) => scaleX(run, data.ends[run])), 1);
    const x = (at) => (SIDE * at) / end, y = (value) => (SIDE * (high - height(value))) / (high - low);
    const drawn = curves.map((points, i) => points.map(([step, value]) => [scaleX(chart.curves[i].run, step), value]));
    for (const path of svg.querySelectorAll("[data-curve]")) {
      const points = drawn[Number(path.dataset.curve)];
      const apart = path.classList.contains("dots") ? points.flatMap(([at, value]) => [[at, value], [at, null]]) : points;
      path.setAttribute("d", line(apart, x, y));
    }
    for (const path of svg.querySelectorAll(".mark"))
      path.setAttribute("d", `M${x(scaleX(Number(path.dataset.run), Number(path.dataset.step))).toFixed(1)} 0V${SIDE}`);
    const across = ticks(0, end, 6), up = log ? logTicks(low, high) : ticks(low, high, 5);
    const rows = up.map((tick) => [(100 * (high - tick)) / (high - low), short(log ? 10 ** tick : tick)]);
    const columns = across.map((tick) => [(100 * tick) / end, short(tick)]);
    labels(figure.querySelector(".rows"), rows, "top");
    labels(figure.querySelector(".columns"), columns, "left");
    svg.querySelector(".grid").setAttribute("d",
      rows.map(([percent]) => `M0 ${(percent * 10).toFixed(1)}H${SIDE}`).join("")
      + columns.map(([percent]) => `M${(percent * 10).toFixed(1)} 0V${SIDE}`).join(""));
    figure.querySelector(".axis").textContent = chosen("axis").value + (log ? ", logarithmic values" : "");
    figure.state = { drawn, end };
  }

  function read(figure, share) {
    if (!figure.state) redraw(figure);
    const { drawn, end } = figure.state, chart = data.charts[figure.dataset.key];
    const at = Math.min(1, Math.max(0, share)) * end;
    const found = drawn.map((points, i) => {
      const finite = points.filter(([, value]) => value !== null);
      if (!finite.length) return null;
      const near = finite.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      return { label: chart.curves[i].label, at: near[0], value: near[1] };
    }).filter(Boolean);
    figure.querySelector(".reading").textContent =
      found.map((f) => `${f.label}: ${Number(f.value.toPrecision(5))} at ${f.at.toLocaleString("en")}`).join("; ");
    let cursor = figure.querySelector(".cursor");
    if (!cursor) {
      cursor = document.createElementNS(SVG, "path");
      cursor.setAttribute("class", "cursor");
      figure.querySelector("svg").append(cursor);
    }
    cursor.setAttribute("d", `M${((SIDE * at) / end).toFixed(1)} 0V${SIDE}`);
    figure.share = at / end;
  }

  const figures = [...document.querySelectorAll("figure.chart")].filter((figure) => figure.querySelector("svg"));
  for (const figure of figures) {
    const svg = figure.querySelector("svg");
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      read(figure, (event.clientX - box.left) / box.width);
    });
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
      if (!move) return;
      event.preventDefault();
      read(figure, (figure.share ?? 0) + move);
    });
  }
  controls.addEventListener("input", () => figures.forEach(redraw));
  controls.addEventListener("submit", (event) => event.preventDefault());
})();
