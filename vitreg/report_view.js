// Brings a report's view to life: which photo, which layer, which threshold. Python (report_view.py) writes the
// page's skeleton and its data; here they are only decoded, coloured, counted and drawn. The page's policy
// allows this script by its hash and nothing else, so it may not change after the page is written.
"use strict";
(() => {
  const view = document.getElementById("view");
  const data = JSON.parse(document.getElementById("view-data").textContent);
  const [rows, columns] = data.grid;
  const patches = rows * columns;
  const within = (root, selector) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);

  // -- numbers -------------------------------------------------------------------------------------

  const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

  function unpacked(base64, valueOf) {
    const steps = new DataView(bytesOf(base64).buffer);
    return Float64Array.from({ length: steps.byteLength / 2 }, (_, i) =>
      valueOf(steps.getUint16(2 * i, true) / 65535),
    );
  }

  const [lowest, highest] = data.normRange;
  const versions = data.versions.map((version) => ({
    ...version,
    norms: unpacked(version.norms, (unit) => Math.exp(lowest + unit * (highest - lowest))),
    attention: unpacked(version.attention, (unit) => unit * unit * data.shareTop),
  }));
  const colours = { norms: bytesOf(data.colours.norms), attention: bytesOf(data.colours.attention) };

  /** One quantity of the patches of the chosen photo. */
  function patchesOf(version, quantity, layer) {
    const start = (state.photo * data.depth + layer) * patches;
    return version[quantity].subarray(start, start + patches);
  }

  function number(value) {
    const short = Number(value.toPrecision(3));
    return Math.abs(short) >= 1e-3 && short < 1e6 ? short.toLocaleString("en", { maximumFractionDigits: 6 }) : String(short);
  }

  const percent = (share) => (share > 0 && share < 0.9995 ? (100 * share).toPrecision(3) : Math.round(100 * share)) + "%";
  const written = { norms: number, attention: percent };
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const largest = (values) => values.reduce((most, value) => Math.max(most, value));
  const logShare = (value, [low, high]) => Math.log(value / low) / Math.log(high / low);

  // -- what is chosen ------------------------------------------------------------------------------

  // A threshold of null is the diagnosis' own, which some layers do not have.
  const state = { photo: 0, layer: data.detect, block: data.depth - 1, threshold: null };
  const limits = { photo: within(view, ".thumbs input").length, layer: data.depth, block: data.depth };

  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const [name, count] of Object.entries(limits)) {
      const words = asked.get(name) ?? "";
      if (/^\d+$/.test(words) && Number(words) < count) state[name] = Number(words);
    }
    const threshold = Number(asked.get("threshold"));
    state.threshold = threshold > 0 && Number.isFinite(threshold) ? threshold : null;
  }

  function writeAddress() {
    const { threshold, ...places } = state;
    const moved = threshold === null ? {} : { threshold: threshold.toPrecision(6) };
    history.replaceState(null, "", `#${new URLSearchParams({ ...places, ...moved })}`);
  }

  const automatic = () => versions[0].thresholds[state.layer];
  const threshold = () => state.threshold ?? automatic() ?? Infinity;
  const marked = (version) => Uint8Array.from(patchesOf(version, "norms", state.layer), (norm) => norm >= threshold());

  // -- maps ----------------------------------------------------------------------------------------

  /** Where a value stands on its layer's colour scale, 0 to 1: as in the figures of vitreg.plot_photos. */
  const unitOf = {
    norms: (norm) => logShare(norm, data.layers[state.layer].norms),
    attention: (share) => Math.sqrt(share / data.layers[state.block].top),
  };

  function paint(canvas, units, width, height, table) {
    canvas.width = width;
    canvas.height = height;
    const image = new ImageData(width, height);
    units.forEach((unit, i) => {
      if (unit < -1e-3 || unit > 1 + 1e-3) return; // outside of the scale: left transparent
      const colour = 3 * Math.min(Math.max(Math.floor(256 * unit), 0), 255);
      image.data.set([...table.subarray(colour, colour + 3), 255], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  /** Borders between patches in the mask and others, as an SVG path in units of patches. */
  function outline(mask) {
    const at = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns && mask[row * columns + column];
    let path = "";
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        if (Boolean(at(row, column)) !== Boolean(at(row - 1, column))) path += `M${column} ${row}h1`;
        if (Boolean(at(row, column)) !== Boolean(at(row, column - 1))) path += `M${column} ${row}v1`;
      }
    }
    return path;
  }

  function svg(name, attributes) {
    const element = document.createElementNS(view.querySelector("svg").namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  }

  function drawOutline(pane, mask) {
    const path = outline(mask);
    const over = pane.querySelector("svg");
    over.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
    over.setAttribute("preserveAspectRatio", "none");
    over.replaceChildren(svg("path", { d: path, class: "casing" }), svg("path", { d: path, class: "outline" }));
  }

  function drawPanes(stage, quantity, layer, masks, captions) {
    const photo = within(view, ".thumbs img")[state.photo];
    for (const pane of within(stage, ".pane")) {
      const index = pane.dataset.version ?? 0;
      drawOutline(pane, masks[index]);
      if (pane.dataset.kind === "photo") {
        Object.assign(pane.querySelector("img"), { src: photo.src, alt: photo.alt });
        write(pane.querySelector("b"), photo.alt);
        continue;
      }
      const values = patchesOf(versions[index], quantity, layer);
      const canvas = pane.querySelector("canvas");
      paint(canvas, Array.from(values, unitOf[quantity]), columns, rows, colours[quantity]);
      const most = written[quantity](largest(values));
      canvas.setAttribute("aria-label", `${photo.alt}, ${versions[index].name}: map of ${quantity}, layer ${layer}, up to ${most}`);
      write(pane.querySelector("output"), captions[index]);
    }
  }

  function drawScale(scale, table, unitAt, ticks, placeOf) {
    const width = 512;
    paint(scale.querySelector("canvas"), Array.from({ length: width }, (_, i) => unitAt((i + 0.5) / width)), width, 1, table);
    scale.querySelector(".ticks").replaceChildren(
      ...ticks[0].map((value, i) => {
        const tick = document.createElement("span");
        tick.textContent = ticks[1][i];
        tick.style.left = `${100 * placeOf(value)}%`;
        return tick;
      }),
    );
  }

  // -- the histogram -------------------------------------------------------------------------------

  const BINS = 96;
  const countRange = [0.6, patches * 1.3]; // logarithmic, the same for all layers
  const powers = [1, 10, 100, 1000, 10000].filter((count) => count < countRange[1]);
  const heightOf = (count) => (count ? 100 * logShare(count, countRange) : 0);

  function drawHistogram(plot, version) {
    const counts = new Array(BINS).fill(0);
    const norms = patchesOf(version, "norms", state.layer);
    for (const norm of norms) counts[Math.min(Math.floor(BINS * logShare(norm, data.axis)), BINS - 1)]++;
    const split = Math.min(BINS * logShare(threshold(), data.axis), BINS);
    const bars = { normal: "", beyond: "" };
    counts.forEach((count, bin) => {
      const height = heightOf(count);
      const bar = (from, to) => `M${from} 100V${100 - height}H${to}V100Z`;
      if (!count) return;
      if (bin < split) bars.normal += bar(bin, Math.min(bin + 1, split));
      if (bin + 1 > split) bars.beyond += bar(Math.max(bin, split), bin + 1);
    });
    const lines = powers.map((count) => `M0 ${100 - heightOf(count)}H${BINS}`);
    plot.setAttribute("viewBox", `0 0 ${BINS} 100`);
    plot.setAttribute("preserveAspectRatio", "none");
    plot.replaceChildren(
      svg("path", { d: lines.join(""), class: "grid" }),
      svg("path", { d: bars.normal, class: "normal" }),
      svg("path", { d: bars.beyond, class: "beyond" }),
    );
    plot.setAttribute("aria-label", `Histogram of norms after block ${state.layer}, ${version.name}: up to ${number(largest(norms))}`);
  }

  // -- words ---------------------------------------------------------------------------------------

  function write(element, words) {
    if (element.textContent !== words) element.textContent = words; // what is told again is read out again
  }

  function countOf(mask) {
    const count = sum(mask);
    return `${count} of ${patches} patches outlined (${percent(count / patches)})`;
  }

  function shareOf(version, mask) {
    const attention = patchesOf(version, "attention", state.block);
    return `${percent(sum(attention.filter((_, i) => mask[i])))} on outlined patches`;
  }

  function writeWords(count) {
    const bound = threshold();
    const words = Number.isFinite(bound) ? number(bound) : "none";
    write(byId("threshold-value"), words);
    byId("threshold").setAttribute("aria-valuetext", words);
    const own = automatic();
    write(byId("automatic-note"), own === null ? "The norms of this layer are one population: the diagnosis sets no threshold here." : `The diagnosis sets it to ${number(own)}, in the gap between two populations.`);
    write(byId("even"), count ? `An even share of ${count} patches is ${percent(count / patches)}.` : "No patch is outlined: none reaches the threshold.");
    write(byId("layer-value"), `${state.layer}${state.layer === data.detect ? data.detectWords : ""}`);
    write(byId("block-value"), `${state.block}${state.block === data.depth - 1 ? " (the last)" : ""}`);
  }

  // -- all of it -----------------------------------------------------------------------------------

  function drawNorms(stage, masks) {
    drawPanes(stage, "norms", state.layer, masks, masks.map(countOf));
    within(stage, ".histogram").forEach((plot, i) => drawHistogram(plot, versions[i]));
    const place = Math.min(Math.max(logShare(threshold(), data.axis), 0), 1);
    stage.querySelector(".mark").style.left = `${100 * place}%`;
    const [low, high] = data.axis;
    const unitAt = (place) => unitOf.norms(low * (high / low) ** place);
    drawScale(stage.querySelector(".scale"), colours.norms, unitAt, data.axisTicks, (norm) => logShare(norm, data.axis));
  }

  function drawAttention(stage, mask) {
    const captions = versions.map((version) => shareOf(version, mask));
    drawPanes(stage, "attention", state.block, versions.map(() => mask), captions);
    const ticks = data.layers[state.block].topTicks;
    drawScale(stage.querySelector(".scale"), colours.attention, (place) => place, ticks, unitOf.attention);
  }

  function draw() {
    const masks = versions.map(marked);
    const [norms, attention] = within(view, ".stage");
    drawNorms(norms, masks);
    drawAttention(attention, masks[0]);
    writeWords(sum(masks[0]));
    setInputs();
  }

  function setInputs() {
    within(view, ".thumbs input")[state.photo].checked = true;
    byId("layer").value = state.layer;
    byId("block").value = state.block;
    byId("threshold").value = Math.log(Math.min(threshold(), data.axis[1]));
  }

  function choose(change) {
    Object.assign(state, change);
    draw();
    writeAddress();
  }

  within(view, "[data-kind=photo] .frame").forEach((frame) => frame.prepend(new Image()));
  for (const plot of within(view, ".histogram")) {
    for (const count of powers) {
      const label = document.createElement("span");
      label.className = "count";
      label.textContent = count === powers.at(-1) ? `${count} patches` : count;
      label.style.bottom = `${heightOf(count)}%`;
      plot.after(label);
    }
  }
  const [axisLow, axisHigh] = data.axis.map(Math.log);
  Object.assign(byId("threshold"), { min: axisLow, max: axisHigh, step: (axisHigh - axisLow) / 500 });
  byId("threshold").addEventListener("input", (event) => choose({ threshold: Math.exp(event.target.valueAsNumber) }));
  byId("automatic").addEventListener("click", () => choose({ threshold: null }));
  for (const name of ["layer", "block"]) {
    byId(name).addEventListener("input", (event) => choose({ [name]: event.target.valueAsNumber }));
  }
  within(view, ".thumbs input").forEach((input, photo) => input.addEventListener("change", () => choose({ photo })));
  // The patch under the pointer, in every picture at once: where it is, and what stands there.
  for (const frame of within(view, ".frame")) {
    frame.addEventListener("pointermove", (event) => {
      const box = frame.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
      if (row >= 0 && row < rows && column >= 0 && column < columns) point(row, column);
    });
    frame.addEventListener("pointerleave", () => unpoint());
  }

  function unpoint() {
    within(view, ".pointed").forEach((element) => element.remove());
  }

  function point(row, column) {
    unpoint();
    const patch = row * columns + column;
    for (const pane of within(view, ".pane")) {
      pane.querySelector("svg").append(svg("rect", { x: column, y: row, width: 1, height: 1, class: "pointed" }));
      const { kind, version } = pane.dataset;
      const layer = kind === "norms" ? state.layer : state.block;
      const label = document.createElement("span");
      label.className = "pointed";
      label.textContent = kind === "photo" ? `row ${row}, column ${column}` : written[kind](patchesOf(versions[version], kind, layer)[patch]);
      pane.querySelector(".frame").append(label);
    }
  }

  addEventListener("hashchange", () => {
    readAddress();
    draw();
  });

  readAddress();
  draw();
  view.hidden = false;
  document.documentElement.classList.add("live");
})();
