// Brings a report's view to life: which photo, which layer, which threshold. Python (report_view.py) writes
// the page's skeleton and its data; here they are only decoded, coloured, counted and drawn. The page's
// policy allows this script by its hash and no other.
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
    features: bytesOf(version.features), // red, green and blue of each patch
  }));
  const colours = { norms: bytesOf(data.colours.norms), attention: bytesOf(data.colours.attention) };

  /** One quantity of the patches of the chosen photo. */
  function patchesOf(version, quantity, layer) {
    const start = (state.photo * data.depth + layer) * patches;
    return version[quantity].subarray(start, start + patches);
  }

  // Three significant digits, as vitreg.plots.style writes them.
  function number(value) {
    const short = Number(value.toPrecision(3));
    const plain = Math.abs(short) >= 1e-3 && short < 1e6;
    return plain ? short.toLocaleString("en", { maximumFractionDigits: 6 }) : String(short);
  }

  function percent(share) {
    return `${share > 0 && share < 0.9995 ? (100 * share).toPrecision(3) : Math.round(100 * share)}%`;
  }

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
    try {
      history.replaceState(null, "", `#${new URLSearchParams({ ...places, ...moved })}`);
    } catch {
      // A page within another page may have no address of its own.
    }
  }

  const layerOf = { norms: () => state.layer, attention: () => state.block };
  const automatic = () => versions[0].thresholds[state.layer];
  const threshold = () => state.threshold ?? automatic() ?? Infinity;
  const normsOf = (version) => patchesOf(version, "norms", state.layer);
  const beyond = (norms, bound) => Uint8Array.from(norms, (norm) => norm >= bound);
  const marked = (version) => beyond(normsOf(version), threshold());

  /** In attention the diagnosis' own outliers, whatever layer is looked at, until the threshold is moved. */
  function attended() {
    if (state.threshold !== null) return marked(versions[0]);
    const norms = patchesOf(versions[0], "norms", data.detect);
    return beyond(norms, versions[0].thresholds[data.detect] ?? Infinity);
  }

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
    const inGrid = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns;
    const at = (row, column) => (inGrid(row, column) ? mask[row * columns + column] : 0);
    let path = "";
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        if (at(row, column) !== at(row - 1, column)) path += `M${column} ${row}h1`;
        if (at(row, column) !== at(row, column - 1)) path += `M${column} ${row}v1`;
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
    const over = pane.querySelector("svg");
    over.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
    over.setAttribute("preserveAspectRatio", "none");
    const d = outline(mask);
    over.replaceChildren(svg("path", { d, class: "casing" }), svg("path", { d, class: "outline" }));
  }

  function drawPhoto(pane, photo) {
    Object.assign(pane.querySelector("img"), { src: photo.src, alt: photo.alt });
    write(pane.querySelector("b"), photo.alt);
  }

  function drawPanes(stage, quantity, layer, masks, captions) {
    const photo = within(view, ".thumbs img")[state.photo];
    for (const pane of within(stage, ".pane")) {
      const index = pane.dataset.version ?? 0;
      drawOutline(pane, masks[index]);
      if (pane.dataset.kind === "photo") {
        drawPhoto(pane, photo);
        continue;
      }
      const values = patchesOf(versions[index], quantity, layer);
      const canvas = pane.querySelector("canvas");
      paint(canvas, Array.from(values, unitOf[quantity]), columns, rows, colours[quantity]);
      const most = written[quantity](largest(values));
      const what = `map of ${quantity}, layer ${layer}, up to ${most}`;
      canvas.setAttribute("aria-label", `${photo.alt}, ${versions[index].name}: ${what}`);
      write(pane.querySelector("output"), captions[index]);
    }
  }

  function paintFeatures(canvas, version) {
    canvas.width = columns;
    canvas.height = rows;
    const image = new ImageData(columns, rows);
    const start = 3 * state.photo * patches;
    for (let i = 0; i < patches; i++) {
      image.data.set([...version.features.subarray(start + 3 * i, start + 3 * i + 3), 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function span(kind, words, place = {}) {
    const element = document.createElement("span");
    element.className = kind;
    element.textContent = words;
    Object.assign(element.style, place);
    return element;
  }

  function drawScale(scale, table, unitAt, [values, words], placeOf) {
    const width = 512;
    const units = Array.from({ length: width }, (_, i) => unitAt((i + 0.5) / width));
    paint(scale.querySelector("canvas"), units, width, 1, table);
    const ticks = values.map((value, i) => span("tick", words[i], { left: `${100 * placeOf(value)}%` }));
    scale.querySelector(".ticks").replaceChildren(...ticks);
  }

  // -- the histogram -------------------------------------------------------------------------------

  const BINS = 96;
  const countRange = [0.6, patches * 1.3]; // logarithmic, the same for all layers
  const powers = [1, 10, 100, 1000, 10000].filter((count) => count < countRange[1]);
  const heightOf = (count) => (count ? 100 * logShare(count, countRange) : 0);

  /** Bars as SVG paths, below the threshold and beyond it; the threshold may cut a bar. */
  function barsOf(norms) {
    const counts = new Array(BINS).fill(0);
    for (const norm of norms) counts[Math.min(Math.floor(BINS * logShare(norm, data.axis)), BINS - 1)]++;
    const split = Math.min(BINS * logShare(threshold(), data.axis), BINS);
    const bars = { normal: "", beyond: "" };
    counts.forEach((count, bin) => {
      const bar = (from, to) => `M${from} 100V${100 - heightOf(count)}H${to}V100Z`;
      if (count && bin < split) bars.normal += bar(bin, Math.min(bin + 1, split));
      if (count && bin + 1 > split) bars.beyond += bar(Math.max(bin, split), bin + 1);
    });
    return bars;
  }

  function drawHistogram(plot, version) {
    const norms = normsOf(version);
    const bars = barsOf(norms);
    const lines = powers.map((count) => `M0 ${100 - heightOf(count)}H${BINS}`).join("");
    plot.setAttribute("viewBox", `0 0 ${BINS} 100`);
    plot.setAttribute("preserveAspectRatio", "none");
    plot.replaceChildren(
      svg("path", { d: lines, class: "grid" }),
      svg("path", { d: bars.normal, class: "normal" }),
      svg("path", { d: bars.beyond, class: "beyond" }),
    );
    const what = `Histogram of norms after block ${state.layer}, ${version.name}`;
    plot.setAttribute("aria-label", `${what}: up to ${number(largest(norms))}`);
  }

  function labelHistogram(plot) {
    for (const count of powers) {
      const words = count === powers.at(-1) ? `${count} patches` : count;
      plot.after(span("count", words, { bottom: `${heightOf(count)}%` }));
    }
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

  function writeThreshold() {
    const bound = threshold();
    const words = Number.isFinite(bound) ? number(bound) : "none";
    write(byId("threshold-value"), words);
    byId("threshold").setAttribute("aria-valuetext", words);
    const own = automatic();
    const none = "In this layer no second population of norms is an artifact: the diagnosis sets no threshold here.";
    const some = `The diagnosis sets it to ${number(own ?? 0)}, where two populations part.`;
    write(byId("automatic-note"), own === null ? none : some);
  }

  function writeWords(count) {
    writeThreshold();
    const own = `the diagnosis' outliers after block ${data.detect}`;
    const moved = `the patches over the threshold after block ${state.layer}`;
    const many = `${count}. Their even share would be ${percent(count / patches)}.`;
    const marks = state.threshold === null ? own : moved;
    write(byId("even"), `Outlined are ${marks}: ${count ? many : "none here."}`);
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
    const unitAt = (share) => unitOf.norms(low * (high / low) ** share);
    const placeOf = (norm) => logShare(norm, data.axis);
    drawScale(stage.querySelector(".scale"), colours.norms, unitAt, data.axisTicks, placeOf);
  }

  function drawAttention(stage, mask) {
    const captions = versions.map((version) => shareOf(version, mask));
    drawPanes(stage, "attention", state.block, versions.map(() => mask), captions);
    const ticks = data.layers[state.block].topTicks;
    drawScale(stage.querySelector(".scale"), colours.attention, (unit) => unit, ticks, unitOf.attention);
  }

  function drawFeatures(stage, mask) {
    const photo = within(view, ".thumbs img")[state.photo];
    for (const pane of within(stage, ".pane")) {
      drawOutline(pane, mask);
      if (pane.dataset.kind === "photo") {
        drawPhoto(pane, photo);
        continue;
      }
      const version = versions[pane.dataset.version];
      const canvas = pane.querySelector("canvas");
      paintFeatures(canvas, version);
      canvas.setAttribute("aria-label", `${photo.alt}, ${version.name}: principal components as colours`);
    }
  }

  function draw() {
    const [norms, attention, features] = within(view, ".stage");
    drawNorms(norms, versions.map(marked));
    drawAttention(attention, attended());
    drawFeatures(features, attended());
    writeWords(sum(attended()));
    setInputs();
  }

  function setInputs() {
    within(view, ".thumbs input")[state.photo].checked = true;
    byId("layer").value = state.layer;
    byId("block").value = state.block;
    byId("threshold").value = Math.log(Math.min(threshold(), data.axis[1]));
  }

  let later;

  function choose(change) {
    Object.assign(state, change);
    draw();
    clearTimeout(later); // browsers refuse an address that changes with every step of a drag
    later = setTimeout(writeAddress, 150);
  }

  // -- the patch under the pointer, in every picture at once: where it is, and what stands there ----

  function unpoint() {
    within(view, ".pointed").forEach((element) => element.remove());
  }

  function point(row, column) {
    unpoint();
    const patch = row * columns + column;
    for (const pane of within(view, ".pane")) {
      const { kind, version } = pane.dataset;
      const hasValues = kind in written;
      const values = hasValues ? patchesOf(versions[version], kind, layerOf[kind]()) : [];
      const words = hasValues ? written[kind](values[patch]) : `row ${row}, column ${column}`;
      const square = { x: column, y: row, width: 1, height: 1, class: "pointed" };
      pane.querySelector("svg").append(svg("rect", square));
      pane.querySelector(".frame").append(span("pointed", words));
    }
  }

  function follow(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    if (row >= 0 && row < rows && column >= 0 && column < columns) point(row, column);
  }

  // -- begin ---------------------------------------------------------------------------------------

  function listen() {
    const [low, high] = data.axis.map(Math.log);
    const slider = byId("threshold");
    Object.assign(slider, { min: low, max: high, step: (high - low) / 500 });
    slider.addEventListener("input", () => choose({ threshold: Math.exp(slider.valueAsNumber) }));
    byId("automatic").addEventListener("click", () => choose({ threshold: null }));
    for (const name of ["layer", "block"]) {
      byId(name).addEventListener("input", (event) => choose({ [name]: event.target.valueAsNumber }));
    }
    within(view, ".thumbs input").forEach((input, photo) => {
      input.addEventListener("change", () => choose({ photo }));
    });
    for (const frame of within(view, ".frame")) {
      frame.addEventListener("pointermove", follow);
      frame.addEventListener("pointerleave", unpoint);
    }
    addEventListener("hashchange", () => {
      readAddress();
      draw();
    });
  }

  within(view, "[data-kind=photo] .frame").forEach((frame) => frame.prepend(new Image()));
  within(view, ".histogram").forEach(labelHistogram);
  listen();
  readAddress();
  draw();
  view.hidden = false;
  document.documentElement.classList.add("live");
})();
