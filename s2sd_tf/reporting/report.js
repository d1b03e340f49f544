"use strict";

// Tables that sort by the column whose heading is clicked. Values that are no numbers come last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const words = new Intl.Collator(undefined, { numeric: true });
  for (const [column, heading] of headings.entries()) {
    const number = heading.dataset.kind === "number";
    const key = (row) => {
      const cell = row.cells[column];
      return number ? parseFloat(cell.textContent.replaceAll(",", "")) : cell.title;
    };
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      const order = number ? (a, b) => a - b : words.compare;
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => (Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : (down ? -1 : 1) * order(a, b)));
      table.tBodies[0].replaceChildren(...rows.map(([, row]) => row));
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  }
}

// The map. All texts come from file names and labels, and are only ever set as textContent, title or aria-label.
if (document.getElementById("map")) drawMap();

function drawMap() {
  const [root, plot, legend, search, all, status, chosen] = ["map", "map-plot", "map-legend", "map-search", "map-all", "map-status", "map-chosen"]
    .map((id) => document.getElementById(id));
  const sheet = document.getElementById("map-sheet");
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const count = data.x.length;
  const points = [...data.x.keys()];
  const name = (item) => data.names[data.classes[item]];
  const found = points.map((point) => `${name(point)}\n${data.ids[point]}`.toLowerCase());
  const classes = new Set(); // those that the reader chose; none: all
  let visible = points;
  let selected = null;
  root.hidden = false;

  const source = new Bokeh.ColumnDataSource({
    data: { x: data.x, y: data.y, color: points.map((point) => data.colors[data.classes[point]]) },
  });
  const marks = new Bokeh.ColumnDataSource({ data: { x: [], y: [], color: [] } });
  const filter = new Bokeh.IndexFilter({ indices: points });
  const hover = new Bokeh.HoverTool({ tooltips: (_, { index }) => tooltip(index), limit: 1, show_arrow: false });
  const tap = new Bokeh.TapTool();
  const figure = Bokeh.Plotting.figure({
    tools: [
      new Bokeh.PanTool(), new Bokeh.BoxZoomTool(), new Bokeh.WheelZoomTool(), new Bokeh.ZoomInTool(),
      new Bokeh.ZoomOutTool(), new Bokeh.ResetTool(), hover, tap,
    ],
    // Until a click on its icon, the wheel scrolls the page.
    active_scroll: null,
    toolbar_location: "above",
    sizing_mode: "stretch_width",
    height: window.innerWidth <= 700 ? 340 : 520,
    outline_line_color: null,
  });
  figure.toolbar.logo = null;
  for (const part of [...figure.xaxis, ...figure.yaxis, ...figure.xgrid, ...figure.ygrid]) part.visible = false;
  // Points that are filtered out stay, to show where the others are.
  const size = count > 1000 ? 7 : 10;
  figure.scatter({ x: { field: "x" }, y: { field: "y" }, source, size: size - 3, color: "#c9d0da", alpha: 0.35 }).nonselection_glyph = null;
  const shown = figure.scatter({
    x: { field: "x" }, y: { field: "y" }, source, view: new Bokeh.CDSView({ filter }), size, line_color: null,
    fill_color: { field: "color" }, fill_alpha: 0.8,
  });
  shown.nonselection_glyph = null;
  shown.selection_glyph = null;
  figure.scatter({ x: { field: "x" }, y: { field: "y" }, source: marks, size: size + 7, fill_color: null, line_width: 2.5, line_color: { field: "color" } });
  hover.renderers = [shown];
  tap.renderers = [shown];
  source.selected.change.connect(() => {
    const [point] = source.selected.indices;
    if (point !== undefined && point !== selected) select(point);
  });
  Bokeh.Plotting.show(figure, plot);

  const buttons = new Map();
  const order = new Intl.Collator(undefined, { numeric: true });
  const sizes = new Map();
  for (const point of points) {
    const code = data.classes[point];
    sizes.set(code, (sizes.get(code) ?? 0) + 1);
  }
  for (const code of [...sizes.keys()].sort((a, b) => order.compare(data.names[a], data.names[b]))) {
    const button = element("button", "", { type: "button", title: data.names[code] });
    const swatch = element("i");
    swatch.style.background = data.colors[code];
    button.append(swatch, element("span", shortened(data.names[code], 24), { className: "name" }), element("span", sizes.get(code).toLocaleString("en")));
    button.addEventListener("click", () => toggle(code));
    buttons.set(code, button);
    const line = element("li");
    line.append(button);
    legend.append(line);
  }
  search.addEventListener("input", update);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && visible.length) select(visible[0]);
  });
  all.addEventListener("click", () => {
    search.value = "";
    classes.clear();
    update();
  });
  document.addEventListener("click", ({ target }) => {
    const link = target.closest("[data-class]");
    if (!link) return;
    search.value = "";
    classes.clear();
    toggle(Number(link.dataset.class));
    root.scrollIntoView();
    buttons.get(Number(link.dataset.class)).focus({ preventScroll: true });
  });
  update();
  showChosen();

  function toggle(code) {
    if (!classes.delete(code)) classes.add(code);
    update();
  }

  function update() {
    const text = search.value.trim().toLowerCase();
    const matching = text ? points.filter((point) => found[point].includes(text)) : points;
    visible = classes.size ? matching.filter((point) => classes.has(data.classes[point])) : matching;
    const matchingClasses = new Set(matching.map((point) => data.classes[point]));
    for (const [code, button] of buttons) {
      button.setAttribute("aria-pressed", classes.has(code));
      button.parentElement.hidden = !matchingClasses.has(code) && !classes.has(code);
    }
    filter.indices = visible;
    const shownClasses = new Set(visible.map((point) => data.classes[point])).size;
    status.textContent = `${visible.length.toLocaleString("en")} of ${count.toLocaleString("en")} images, ${shownClasses.toLocaleString("en")} of ${buttons.size.toLocaleString("en")} classes`;
  }

  function select(point) {
    selected = point;
    source.selected.indices = [point];
    const near = data.near[point].filter((item) => item < count);
    const shownPoints = [point, ...near];
    marks.data = {
      x: shownPoints.map((item) => data.x[item]),
      y: shownPoints.map((item) => data.y[item]),
      color: shownPoints.map((item, at) => (at ? color(item) : "#1c2430")),
    };
    showChosen();
  }

  function color(item) {
    return data.classes[item] === data.classes[selected] ? "#2e8b57" : "#c0392b";
  }

  function showChosen() {
    if (selected === null) {
      chosen.replaceChildren(element("p", "Click on an image in the map, or step through them, to see its neighbours."), steps());
      return;
    }
    const quality = data.quality[selected];
    const row = element("div", "", { className: "query" });
    row.append(picture(selected, "#1c2430", "query"));
    for (const [at, item] of data.near[selected].entries()) {
      row.append(picture(item, color(item), data.similarities[selected][at].toFixed(3)));
    }
    chosen.replaceChildren(
      element("h3", `${name(selected)} \u00b7 ${data.ids[selected]}`),
      element("p", quality === null ? "No other image of its class." : `MAP@R ${quality.toFixed(1)}. Green: same class; red: another.`),
      row, steps(),
    );
  }

  function steps() {
    const bar = element("div", "", { className: "steps" });
    for (const [text, step] of [["Previous image", -1], ["Next image", 1]]) {
      const button = element("button", text, { type: "button" });
      button.addEventListener("click", () => {
        if (!visible.length) return;
        const at = visible.indexOf(selected);
        select(visible[at < 0 ? 0 : (at + step + visible.length) % visible.length]);
        chosen.querySelectorAll(".steps button")[step < 0 ? 0 : 1].focus({ preventScroll: true });
      });
      bar.append(button);
    }
    return bar;
  }

  // A picture with its caption; that of another point is a button that goes there.
  function picture(item, frame, score) {
    const box = element("figure", "", { title: `${name(item)} \u00b7 ${data.ids[item]}` });
    const inside = item < count && item !== selected ? element("button", "", { type: "button" }) : element("div");
    if (inside.tagName === "BUTTON") inside.addEventListener("click", () => select(item));
    const image = thumbnail(item);
    image.style.borderColor = frame;
    inside.append(image, element("span", score, { className: "score" }), element("span", shortened(name(item), 44)));
    box.append(inside);
    return box;
  }

  function thumbnail(item) {
    const cell = data.cells[item];
    if (cell < 0) return element("div", "", { className: "thumb" });
    const canvas = element("canvas", "", { className: "thumb", width: data.side, height: data.side });
    const across = sheet.naturalWidth / data.side;
    const draw = () => canvas.getContext("2d").drawImage(
      sheet, (cell % across) * data.side, Math.floor(cell / across) * data.side, data.side, data.side, 0, 0, data.side, data.side);
    sheet.decode().then(draw);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", name(item));
    return canvas;
  }

  function tooltip(point) {
    const box = element("div");
    box.style.cssText = "max-width: 150px; font: 12px/1.3 system-ui, sans-serif; overflow-wrap: anywhere;";
    if (data.cells[point] >= 0) {
      const image = thumbnail(point);
      image.style.cssText = "width: 96px; height: 96px; display: block;";
      box.append(image);
    }
    const heading = element("div", name(point));
    heading.style.fontWeight = "600";
    box.append(heading, element("div", data.ids[point]));
    return box;
  }

  function shortened(text, length) {
    return text.length <= length ? text : `${text.slice(0, length / 2 - 1)}\u2026${text.slice(-length / 2)}`;
  }

  function element(tag, text = "", properties = {}) {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    return Object.assign(made, properties);
  }
}
