"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)");
const DASHES = [[], [6, 3], [2, 3], [10, 3, 2, 3]]; // so that lines differ without their colours too
const COLOURS = 4;
const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const shown = value => value === null ? "" : value && Math.abs(value) < 0.001 ? value.toExponential(1) : NUMBER.format(value);

// One chart of the page: its lines, and the plot that shows those with points.
class Chart {
  constructor(place) {
    this.place = place;
    this.figure = place.closest("figure");
    this.spec = JSON.parse(place.dataset.chart);
    this.draw();
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.figure);
  }

  size() {
    return { width: this.place.clientWidth, height: 240 };
  }

  clear() {
    for (const line of this.spec.lines) line.points = [];
  }

  add(row) {
    for (const line of this.spec.lines) {
      if (line.key && line.key in row) line.points.push([row.step, row[line.key] * this.spec.scale]);
    }
  }

  data(lines) {
    const steps = [...new Set(lines.flatMap(line => line.points.map(point => point[0])))].sort((a, b) => a - b);
    const place = new Map(steps.map((step, index) => [step, index]));
    return [steps, ...lines.map(line => {
      const values = Array(steps.length).fill(null);
      for (const [step, value] of line.points) values[place.get(step)] = value;
      return values;
    })];
  }

  // A single value would get an axis to twice its height, beyond what a share can reach.
  range(low, high) {
    if (low === null) return [null, null]; // every line is switched off
    const [from, to] = uPlot.rangeNum(low, high, 0.1, true);
    const [least, most] = this.spec.bounds ?? [-Infinity, Infinity];
    return [Math.max(from, least), Math.min(to, most)];
  }

  update() {
    const lines = this.spec.lines.filter(line => line.points.length);
    if (this.plot && lines.length === this.shown) this.plot.setData(this.data(lines));
    else this.draw();
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    const lines = this.spec.lines.filter(line => line.points.length);
    this.shown = lines.length;
    this.figure.hidden = !lines.length;
    if (!lines.length) return;
    const style = getComputedStyle(document.documentElement);
    const colour = name => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line") }, ticks: { stroke: colour("--line") } };
    const series = lines.map(line => {
      const index = this.spec.lines.indexOf(line);
      return {
        label: line.label,
        stroke: colour(`--series-${index % COLOURS + 1}`),
        dash: DASHES[Math.floor(index / COLOURS) % DASHES.length],
        width: 2,
        value: (_, value) => shown(value),
        points: { show: line.dots || line.points.length === 1, size: 6 },
        spanGaps: true,
        ...(line.joined ? {} : { paths: () => null }),
      };
    });
    this.plot = new uPlot({
      ...this.size(),
      scales: { x: { time: false }, y: { range: (_, low, high) => this.range(low, high) } },
      axes: [{ ...axis }, { ...axis, size: 64, values: (_, values) => values.map(shown) }],
      series: [{ label: this.spec.below, value: (_, step) => step === null ? "" : step }, ...series],
      cursor: { drag: { x: false, y: false } },
    }, this.data(lines), this.place);
  }
}

const charts = [...document.querySelectorAll("[data-chart]")].map(place => new Chart(place));
dark.addEventListener("change", () => charts.forEach(chart => chart.draw()));

// A run in progress: each row of its metrics as it is written.
const state = document.getElementById("run-state");
if (state?.dataset.events) {
  const steps = document.querySelector("#steps-table tbody");
  const columns = [...document.querySelectorAll("#steps-table [data-column]")].map(cell => cell.dataset);
  const events = new EventSource(state.dataset.events);
  let waiting = false;
  let evaluated = false;
  // What follows an evaluation is made by the server, as when the page is loaded.
  const refresh = async () => {
    evaluated = false;
    const answer = await fetch(location.href).catch(() => null);
    if (!answer?.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const id of ["evaluations-table", "dev-answers"]) {
      const part = page.getElementById(id);
      if (part) document.getElementById(id).replaceWith(part);
    }
  };
  const later = () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      charts.forEach(chart => chart.update());
      if (evaluated) refresh();
    }, still.matches ? 5000 : 500);
  };
  events.addEventListener("again", () => {
    charts.forEach(chart => chart.clear());
    steps.replaceChildren();
  });
  events.onmessage = event => {
    const row = JSON.parse(event.data);
    charts.forEach(chart => chart.add(row));
    if ("loss" in row) {
      const line = document.createElement("tr");
      const step = document.createElement("th");
      step.scope = "row";
      step.textContent = row.step;
      line.append(step, ...columns.map(({ column, scale }) => {
        const cell = document.createElement("td");
        if (column in row) cell.textContent = shown(row[column] / (scale ?? 1));
        return cell;
      }));
      steps.prepend(line);
      if (steps.rows.length > 20) steps.lastElementChild.remove();
    } else {
      evaluated = true;
    }
    later();
  };
  events.addEventListener("fault", event => {
    events.close();
    const fault = document.getElementById("run-fault");
    fault.textContent = event.data;
    fault.hidden = false;
  });
  events.addEventListener("finished", () => {
    events.close();
    location.reload();
  });
}
