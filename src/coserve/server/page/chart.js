// A line chart in the page's colours, over uPlot. Owns: size, theme, legend, the readout under the pointer. Not: data.

import { el, setText } from "./dom.js";

const HEIGHT = 168;
const charts = new Set();

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/**
 * series: [{label, color (a CSS variable), format, scale?, width?, dash?, points?, constant?, optional? (in the legend only with
 * data)}]; scales: uPlot's, by name;
 * axes: [{scale, side?, color?, format}] of the y scales; steps: distances that x ticks may have; formatX(value, step): for
 * ticks; formatReadout: for what is under the pointer. The first datum is always x.
 */
export class LineChart {
  constructor(figure, { title, heading = "h3", series, scales, axes, steps, formatX, formatReadout = formatX, x = {} }) {
    this.options = { series, scales, axes, steps, formatX, formatReadout, x };
    this.readout = el("span", { class: "readout", "aria-hidden": true });
    this.plot = el("div", { class: "plot", role: "img", "aria-label": title });
    this.entries = series.map((line) => el("li", { hidden: line.optional }, swatch(line), line.label));
    const legend = el("ul", { class: "legend" }, ...this.entries);
    legend.hidden = series.length === 1;
    figure.append(el("figcaption", {}, el(heading, {}, title), this.readout, legend), this.plot);
    this.title = title;
    this.data = [[], ...series.map(() => [])];
    charts.add(this);
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  /** data: [x, ...series]; summary: the same in words, for those who don't see the picture. */
  set(data, summary) {
    this.data = data;
    this.options.series.forEach((line, i) => {
      if (line.optional) this.entries[i].hidden = data[i + 1].every((value) => value === null);
    });
    const label = `${this.title}: ${summary}`;
    if (this.plot.getAttribute("aria-label") !== label) this.plot.setAttribute("aria-label", label);
    if (this.uplot) this.uplot.setData(data);
    else this.build();
  }

  resize() {
    const width = this.plot.clientWidth;
    if (width > 0 && this.uplot && this.uplot.width !== width) this.uplot.setSize({ width, height: HEIGHT });
    else if (!this.uplot) this.build();
  }

  build() {
    const width = this.plot.clientWidth;
    if (this.uplot) this.uplot.destroy();
    this.uplot = null;
    if (width === 0) return;
    const { series, scales, axes, steps, formatX, x } = this.options;
    const font = `11px ${variable("--font")}`;
    const grid = { stroke: variable("--grid"), width: 1 };
    const bare = { stroke: variable("--muted"), font, ticks: { show: false }, gap: 6 };
    this.uplot = new window.uPlot({
      width, height: HEIGHT, padding: [8, axes.length > 1 ? 4 : 26, 0, 0],
      legend: { show: false }, scales: { x: { time: false, ...x }, ...scales },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 5 } },
      series: [{}, ...series.map((line) => drawn(line))],
      axes: [
        { ...bare, grid: { show: false }, size: 26, space: 64, ...(steps && { incrs: steps }), values: (_, ticks, __, ___, step) => ticks.map((tick) => formatX(tick, step)) },
        ...axes.map(({ scale, side = 3, color, format }, i) => ({
          ...bare, scale, side, size: 42, space: 24, grid: i === 0 ? grid : { show: false },
          stroke: variable(color || "--muted"), values: (_, ticks) => ticks.map((value) => (value === null ? "" : format(value))),
        })),
      ],
      hooks: { setCursor: [(chart) => this.read(chart.cursor.idx)] },
    }, this.data, this.plot);
  }

  read(index) {
    const time = index === null || index === undefined ? undefined : this.data[0][index];
    if (time === undefined) {
      setText(this.readout, "");
      return;
    }
    const { series, formatReadout } = this.options;
    const values = series.map((line, i) => [line, this.data[i + 1][index]]).filter(([line, value]) => value !== null && !line.constant);
    setText(this.readout, `${formatReadout(time)}: ${values.map(([line, value]) => `${line.label.toLowerCase()} ${line.format(value)}`).join(", ")}`);
  }
}

function drawn({ color, scale = "y", width = 1.75, dash, points }) {
  const stroke = variable(color);
  return {
    stroke, scale, width, dash, spanGaps: Boolean(points),
    points: points ? { show: true, size: 5, fill: stroke } : { show: false },
  };
}

function swatch({ color, dash }) {
  const mark = el("span", { class: dash ? "swatch dashed" : "swatch", "aria-hidden": true });
  mark.style.color = `var(${color})`;
  return mark;
}

window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of charts) chart.build();
});
