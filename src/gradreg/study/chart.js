// Draws a page's charts as SVG: lines, bands and points of Plotly's figures, as charts.py describes them. A page that embeds Plotly has five megabytes.
// What a figure holds that is not drawn here is an error in the console, never left out in silence.
"use strict";
const DASHES = { solid: "", dot: "1.5 4", dash: "8 5", longdash: "12 6", dashdot: "8 4 2 4" };
const TRACE = new Set(["type", "x", "y", "mode", "name", "line", "marker", "fill", "fillcolor", "opacity", "hoverinfo", "hovertemplate", "text", "legendgroup", "showlegend", "xaxis", "yaxis"]);
const AXIS = new Set(["title", "type", "range", "tickvals", "ticktext", "showgrid", "anchor", "domain", "matches", "showticklabels"]);
const ARRAYS = { f8: Float64Array, f4: Float32Array, i4: Int32Array, u4: Uint32Array, i2: Int16Array, u2: Uint16Array, i1: Int8Array, u1: Uint8Array };

function svg(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return parent ? parent.appendChild(element) : element;
}

function numbers(values) { // Plotly writes NumPy arrays as base64
  if (!values || !values.bdata) return values || [];
  return [...new ARRAYS[values.dtype](Uint8Array.from(atob(values.bdata), letter => letter.charCodeAt(0)).buffer)];
}

function shown(value, format) { // the part of d3's formats that figures use: .4g, .2f, .1%, .3e
  const [, digits, kind] = /^\.(\d+)([gfe%])$/.exec(format || ".6g") || [null, 6, "g"];
  if (kind === "%") return (100 * value).toFixed(digits) + "%";
  if (kind === "f") return value.toFixed(digits);
  if (kind === "e") return value.toExponential(digits);
  const text = Number(value).toPrecision(Math.max(1, digits));
  return text.includes(".") ? text.replace(/\.?0+(?=e|$)/, "") : text;
}

function ticks(low, high, count, log) {
  if (log) { // low and high are exponents
    const found = [];
    for (let decade = Math.floor(low); decade <= high; decade += Math.max(1, Math.ceil((high - low) / count)))
      for (const digit of high - low < 1.2 ? [1, 2, 3, 5, 7] : high - low < 3 ? [1, 2, 5] : [1]) {
        const place = decade + Math.log10(digit);
        if (place >= low - 1e-9 && place <= high + 1e-9) found.push(place);
      }
    return found;
  }
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find(factor => factor * power >= raw * 0.999) * power, found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function drawChart(id, data, layout) {
  const host = document.getElementById(id), hidden = new Set();
  for (const trace of data) {
    const strange = Object.keys(trace).filter(key => !TRACE.has(key));
    if (trace.type !== "scatter" || strange.length) console.error(`chart ${id}: ${trace.type} with ${strange} is not drawn`);
    trace.x = numbers(trace.x), trace.y = numbers(trace.y), trace.group = trace.legendgroup || trace.name || "";
  }
  const axisOf = name => layout[name[0] + "axis" + name.slice(1)] || {};
  for (const key of Object.keys(layout).filter(key => /^[xy]axis\d*$/.test(key))) {
    const strange = Object.keys(layout[key]).filter(one => !AXIS.has(one));
    if (strange.length) console.error(`chart ${id}: ${strange} of an axis is not drawn`);
  }
  // Panels side by side, an x axis each, with one range of y; below one another where they would be narrow.
  const panels = [...new Set(data.map(trace => trace.xaxis || "x"))].map(name => ({ name, place: document.createElement("div"), points: [] }));
  if (!panels.length) panels.push({ name: "x", place: document.createElement("div"), points: [] });
  if ((layout.annotations || []).length || (layout.shapes || []).some(one => one.type !== "line")) console.error(`chart ${id}: only lines are drawn beside the traces`);

  const legend = host.appendChild(document.createElement("div")), canvas = host.appendChild(document.createElement("div"));
  const tip = host.appendChild(document.createElement("div"));
  canvas.append(...panels.map(panel => panel.place));
  legend.className = "legend", canvas.className = "canvas", tip.className = "tip", tip.hidden = true;
  const groups = data.filter(trace => trace.showlegend !== false && trace.name);
  if (groups.length > 1 || groups.some(trace => trace.showlegend)) for (const trace of groups) {
    const button = legend.appendChild(document.createElement("button")), sample = svg("svg", { width: 26, height: 12 }, button);
    const color = (trace.line || {}).color || (trace.marker || {}).color;
    if ((trace.mode || "").includes("lines")) svg("path", { d: "M1 6H25", stroke: color, "stroke-width": 2.5, "stroke-dasharray": DASHES[(trace.line || {}).dash || "solid"] }, sample);
    else svg("circle", { cx: 13, cy: 6, r: 4.5, fill: color }, sample);
    button.type = "button", button.append(trace.name), button.title = "shows or hides; twice: alone";
    const refresh = () => {
      [...legend.children].forEach((one, i) => one.setAttribute("aria-pressed", !hidden.has(groups[i].group)));
      draw();
    };
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => { hidden.delete(trace.group) || hidden.add(trace.group); refresh(); });
    button.addEventListener("dblclick", () => {
      const alone = groups.every(one => one.group === trace.group || hidden.has(one.group));
      hidden.clear();
      if (!alone) groups.forEach(one => one.group !== trace.group && hidden.add(one.group));
      refresh();
    });
  }

  function draw() {
    panels.forEach(drawPanel);
    tip.hidden = true;
  }

  function drawPanel(panel, index) {
    const width = panel.place.clientWidth, height = layout.height || 420, all = data.filter(trace => !hidden.has(trace.group));
    const seen = all.filter(trace => (trace.xaxis || "x") === panel.name), axes = { x: axisOf(panel.name), y: axisOf("y") };
    const shapes = layout.shapes || [], place = {}, span = {};
    for (const name of ["x", "y"]) {
      const axis = axes[name], log = axis.type === "log", on = value => log ? Math.log10(value) : Number(value);
      const own = shapes.filter(one => !(one[name + "ref"] || name).match(/paper|domain/)).flatMap(one => [one[name + "0"], one[name + "1"]]);
      const values = [...(name === "x" ? seen : all).flatMap(trace => trace[name]), ...own, ...(axis.tickvals || [])].filter(value => value !== null && (!log || value > 0)).map(on).filter(Number.isFinite);
      let [low, high] = values.length ? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : [0, 1];
      const bare = name === "x" && !axis.tickvals && seen.every(trace => !(trace.mode || "").includes("markers"));
      const margin = axis.tickvals ? 0.15 : bare ? 0 : (high - low) * 0.06 || Math.abs(low) * 0.1 || 1;
      [low, high] = axis.range || [low - margin, high + margin];
      span[name] = { low, high: high > low ? high : low + 1, on, log };
    }
    const side = { left: 64, right: 16, top: 10, bottom: 50 };
    const labels = (axes.x.ticktext || []).map(text => text.split(/<br>/)), each = labels.length ? (width - side.left - side.right) / labels.length : 0;
    const long = Math.max(0, ...labels.flat().map(line => line.length * 7.2)), tilted = labels.length > 0 && long > each;
    if (labels.length) side.bottom = tilted ? Math.min(150, 24 + long * 0.72 + 12 * Math.max(...labels.map(one => one.length))) : 20 + 17 * Math.max(...labels.map(one => one.length));
    const inner = { left: side.left, right: width - side.right, top: side.top, bottom: height - side.bottom };
    place.x = value => inner.left + (span.x.on(value) - span.x.low) / (span.x.high - span.x.low) * (inner.right - inner.left);
    place.y = value => inner.bottom - (span.y.on(value) - span.y.low) / (span.y.high - span.y.low) * (inner.bottom - inner.top);

    const title = axis => (axis.title || {}).text || "";
    const root = svg("svg", { class: "drawn", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": [title(axes.y), title(axes.x)].filter(Boolean).join(" by ") });
    svg("rect", { x: inner.left, y: inner.top, width: Math.max(0, inner.right - inner.left), height: inner.bottom - inner.top }, svg("clipPath", { id: `${id}-clip-${index}` }, svg("defs", {}, root)));
    for (const name of ["x", "y"]) {
      const axis = axes[name], { low, high, log } = span[name], back = value => log ? 10 ** value : value;
      const marks = axis.tickvals ? numbers(axis.tickvals) : ticks(low, high, name === "x" ? width / 90 : height / 70, log).map(back);
      marks.forEach((mark, i) => {
        const at = place[name](mark);
        if (axis.showgrid !== false) svg("path", { class: "grid", d: name === "x" ? `M${at} ${inner.top}V${inner.bottom}` : `M${inner.left} ${at}H${inner.right}` }, root);
        const text = svg("text", name === "x" ? { x: at, y: inner.bottom + 18, "text-anchor": tilted ? "end" : "middle" } : { x: inner.left - 8, y: at + 4, "text-anchor": "end" }, root);
        if (tilted && name === "x") text.setAttribute("transform", `rotate(-45 ${at} ${inner.bottom + 18})`);
        (name === "x" && labels[i] || [shown(mark, ".6g")]).forEach((line, j) => svg("tspan", name === "x" ? { x: at, dy: j ? 16 : 0 } : {}, text).textContent = line);
      });
    }
    svg("path", { class: "axis", d: `M${inner.left} ${inner.top}V${inner.bottom}H${inner.right}` }, root);
    svg("text", { x: (inner.left + inner.right) / 2, y: height - 8, "text-anchor": "middle" }, root).textContent = title(axes.x);
    svg("text", { x: 16, y: (inner.top + inner.bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 16 ${(inner.top + inner.bottom) / 2})` }, root).textContent = title(axes.y);

    const inside = svg("g", { "clip-path": `url(#${id}-clip-${index})` }, root);
    const points = (panel.points = []);
    for (const trace of seen) {
      const line = trace.line || {}, mode = trace.mode || "lines", marker = { color: line.color, ...trace.marker };
      const known = trace.x.map((x, i) => [x, trace.y[i], i]).filter(([x, y]) => x !== null && y !== null && (!span.x.log || x > 0) && (!span.y.log || y > 0));
      const at = known.map(([x, y]) => [place.x(x), place.y(y)]);
      const path = at.map(([x, y], i) => (i && line.shape === "hv" ? `H${x}V${y}` : `${i ? "L" : "M"}${x} ${y}`)).join("");
      const opacity = trace.opacity === undefined ? 1 : trace.opacity;
      if (trace.fill === "toself") svg("path", { class: "band", d: path + "Z", fill: trace.fillcolor || line.color, opacity }, inside);
      else if (mode.includes("lines")) svg("path", { class: "line", d: path, stroke: line.color, "stroke-width": line.width || 2, "stroke-dasharray": DASHES[line.dash || "solid"], opacity }, inside);
      if (mode.includes("markers")) at.forEach(([x, y]) => {
        const open = (marker.symbol || "").endsWith("-open");
        svg("circle", { class: "point", cx: x, cy: y, r: (marker.size || 6) / 2, fill: open ? "none" : marker.color, stroke: open ? marker.color : "none", "stroke-width": 1.5, opacity: marker.opacity || opacity }, inside);
      });
      if (trace.hoverinfo !== "skip") at.forEach(([x, y], i) => points.push({ x, y, trace, i: known[i][2] }));
    }
    for (const one of shapes) {
      const end = (name, value) => (one[name + "ref"] || name).match(/paper|domain/) ? (name === "x" ? inner.left + value * (inner.right - inner.left) : inner.bottom - value * (inner.bottom - inner.top)) : place[name](value);
      svg("path", { class: "shape", d: `M${end("x", one.x0)} ${end("y", one.y0)}L${end("x", one.x1)} ${end("y", one.y1)}`, stroke: one.line.color, "stroke-width": one.line.width || 2, "stroke-dasharray": DASHES[one.line.dash || "solid"] }, inside);
    }
    panel.place.replaceChildren(root);
  }

  for (const panel of panels) panel.place.addEventListener("pointermove", event => {
    const box = panel.place.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const far = one => Math.hypot(one.x - x, one.y - y), near = panel.points.reduce((best, one) => (best && far(best) <= far(one) ? best : one), null);
    tip.hidden = !near || far(near) > 40;
    if (tip.hidden) return;
    const { trace, i } = near, text = Array.isArray(trace.text) ? trace.text[i] : trace.text || "";
    const said = (trace.hovertemplate || "%{x}, %{y:.4g}<extra>" + (trace.name || "") + "</extra>")
      .replace(/%\{(x|y|text)(?::([^}]+))?\}/g, (_, key, format) => key === "text" ? text : typeof trace[key][i] === "number" ? shown(trace[key][i], format) : trace[key][i]);
    const [value, extra] = said.split("<extra>");
    tip.replaceChildren(...value.split("<br>").flatMap((line, j) => j ? [document.createElement("br"), line] : [line]));
    if (extra) tip.append(document.createElement("br"), Object.assign(document.createElement("b"), { textContent: extra.replace("</extra>", "") }));
    tip.style.left = Math.max(0, Math.min(panel.place.offsetLeft + near.x + 12, host.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = panel.place.offsetTop + Math.max(0, near.y - tip.offsetHeight - 10) + "px";
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  let drawn = 0;
  new ResizeObserver(() => { if (canvas.clientWidth !== drawn) { drawn = canvas.clientWidth; draw(); } }).observe(canvas);
}
