"use strict";
// Draws the timeline in the element #data. Times are seconds from the start of the trace.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const lanes = data.lanes;
  const steps = data.steps;
  const whole = Math.max(data.duration_s, 1e-6);
  const at = (id) => document.getElementById(id);
  const top = at("top"), body = at("lanes"), scroller = at("scroller"), spacer = at("spacer");
  const LANE = 20, BAR = 12, AXIS = 24, CURVE = 44, STEPS = 52, HOST = 8, GAP = 14;
  const TOP = AXIS + 2 * (CURVE + GAP) + STEPS + HOST + GAP + 6;
  const MIN_SPAN = Math.max(whole * 1e-7, 2e-6);
  const view = { start: 0, end: whole };
  let matching = lanes.map((_, number) => number), shown = matching;
  let picked = -1, hover = null, colours = {}, isQueued = false, isStillGood = false, isTableGood = false;

  // --- words and numbers ---
  const number = (value) => value === null || value === undefined ? "?" : value.toLocaleString("en-US");
  function seconds(value) {
    if (value === null || value === undefined) return "?";
    const size = Math.abs(value);
    if (size >= 100) return value.toFixed(0) + " s";
    if (size >= 1) return value.toFixed(2) + " s";
    if (size >= 0.01) return (value * 1e3).toFixed(0) + " ms";
    if (size >= 0.001) return (value * 1e3).toFixed(1) + " ms";
    return (value * 1e6).toFixed(0) + " \u00b5s";
  }
  const percent = (share) => (share * 100).toFixed(share < 0.1 ? 1 : 0) + "%";
  function quantile(values, share) {
    if (!values.length) return null;
    const sorted = [...values].sort((a, b) => a - b);
    return sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(share * sorted.length) - 1))];
  }
  const titleOf = (lane) => lane.index ? `${lane.request_id} [${lane.index}]` : lane.request_id;
  const outcomeOf = (lane) => lane.outcome || "goes on";
  const startOf = (lane) => lane.phases.length ? lane.phases[0].start_s : 0;
  const endOf = (lane) => lane.phases.length ? lane.phases[lane.phases.length - 1].end_s : whole;
  const ttftOf = (lane) => lane.queued_s === null || lane.first_token_s === null ? null : lane.first_token_s - lane.queued_s;
  const waitedOf = (lane) => lane.phases.filter((p) => p.kind === "queued").reduce((sum, p) => sum + p.end_s - p.start_s, 0);

  function element(tag, text, parent) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function fillHead() {
    at("model").textContent = data.model;
    document.title = `Trace ${data.model}`;
    const dropped = data.num_dropped_steps || data.num_dropped_events
      ? `; the ring has let go of ${number(data.num_dropped_steps)} earlier steps` : "";
    at("about").textContent = `${seconds(data.duration_s)} from ${data.began.replace("T", " ").replace("+00:00", " UTC")}${dropped}`;
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    const ttfts = lanes.map(ttftOf).filter((value) => value !== null);
    const prefill = sum(steps.map((step) => step.num_prefill_tokens));
    const decode = sum(steps.map((step) => step.num_decode_tokens));
    const cached = sum(lanes.map((lane) => lane.num_cached_tokens || 0));
    const tiles = [
      ["Requests", number(lanes.length)],
      ["Steps", number(steps.length)],
      ["Prefill tokens", number(prefill), `+ ${number(cached)} cached`],
      ["Decode tokens", number(decode)],
      ["Tokens/s", number(Math.round((prefill + decode) / whole))],
      ["First token, median", seconds(quantile(ttfts, 0.5))],
      ["First token, p95", seconds(quantile(ttfts, 0.95))],
      ["Preemptions", number(sum(lanes.map((lane) => lane.num_preemptions)))],
    ];
    for (const [name, value, more] of tiles) {
      const tile = element("div", undefined, at("tiles"));
      element("dt", name, tile);
      const figure = element("dd", value, tile);
      if (more) element("small", " " + more, figure);
    }
    const words = { queued: "queued", prefill: "prefill (solid: a chunk)", decode: "decode", preempted: "preempted", host: "host: plan and commit (pale: launch)" };
    for (const [kind, word] of Object.entries(words)) {
      const item = element("li", undefined, at("legend"));
      element("i", undefined, item).style.background = `var(--${kind})`;
      element("span", word, item);
    }
  }

  // Thousands of rows take a moment: they are made when somebody looks.
  function fillTable() {
    if (!at("table-box").open || isTableGood) return;
    isTableGood = true;
    at("rows").replaceChildren();
    for (const place of matching) {
      const lane = lanes[place];
      const row = element("tr", undefined, at("rows"));
      row.dataset.lane = place;
      element("button", titleOf(lane), element("td", undefined, row)).type = "button";
      for (const text of [
        seconds(startOf(lane)), seconds(waitedOf(lane)), seconds(ttftOf(lane)), seconds(endOf(lane) - startOf(lane)),
        number(lane.num_prompt_tokens), number(lane.num_cached_tokens), number(lane.num_output_tokens),
        number(lane.num_preemptions), outcomeOf(lane),
      ]) element("td", text, row);
      row.addEventListener("click", () => { zoomToLane(place); pick(shown.indexOf(place)); });
    }
  }

  // --- geometry ---
  // Asking the page for its width is slow, and drawing asks for it at every step.
  let wide = 0;
  const measure = () => { wide = at("chart").clientWidth; };
  const left = () => Math.min(190, Math.max(96, wide * 0.16));
  const width = () => Math.max(40, wide - left() - 12);
  const xOf = (time) => left() + (time - view.start) / (view.end - view.start) * width();
  const timeOf = (x) => view.start + (x - left()) / width() * (view.end - view.start);

  function look(start, end) {
    const span = Math.min(whole, Math.max(MIN_SPAN, end - start));
    view.start = Math.min(Math.max(0, start), whole - span);
    view.end = view.start + span;
    choose();
    redraw();
  }
  const zoom = (factor, around) => {
    const middle = around === undefined ? (view.start + view.end) / 2 : around;
    look(middle - (middle - view.start) * factor, middle + (view.end - middle) * factor);
  };
  const move = (share) => { const by = (view.end - view.start) * share; look(view.start + by, view.end + by); };
  const zoomTo = (start, end) => { const rim = Math.max((end - start) * 0.06, MIN_SPAN / 4); look(start - rim, end + rim); };
  const zoomToLane = (place) => zoomTo(startOf(lanes[place]), endOf(lanes[place]));

  function firstAfter(list, time, key) {
    let low = 0, high = list.length;
    while (low < high) { const mid = (low + high) >> 1; if (list[mid][key] < time) low = mid + 1; else high = mid; }
    return low;
  }
  const stepsInView = () => [Math.max(0, firstAfter(steps, view.start, "collected_s") - 1), firstAfter(steps, view.end, "planned_s")];
  // The device takes one step at a time: one that is launched early waits for the one before.
  const deviceStart = steps.map((step, place) => Math.max(step.scheduled_s, place ? steps[place - 1].collected_s : 0));

  // --- drawing ---
  function readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["text", "soft", "faint", "line", "grid", "panel", "queued", "prefill", "decode", "preempted", "host", "running", "waiting", "kv", "pick", "stripe"]) {
      colours[name] = style.getPropertyValue(`--${name}`).trim();
    }
  }
  function prepare(canvas, height, wide) {
    const ratio = window.devicePixelRatio || 1;
    canvas.style.height = height + "px";
    const w = Math.round(wide * ratio), h = Math.round(height * ratio);
    if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, wide, height);
    pen.font = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";
    pen.textBaseline = "middle";
    return pen;
  }
  function ticks() {
    const raw = (view.end - view.start) / Math.max(2, width() / 110), power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
    const found = [];
    for (let k = Math.ceil(view.start / step - 1e-9); k * step <= view.end + step * 1e-6; k++) found.push(k * step);
    return [found, step];
  }
  function tickText(time, step) {
    if (step >= 1) return time.toFixed(0) + " s";
    if (whole >= 10 && step >= 0.001) return time.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9))) + " s";
    if (step >= 0.001 || time === 0) return (time * 1e3).toFixed(0) + " ms";
    return (time * 1e3).toFixed(-Math.floor(Math.log10(step * 1e3) + 1e-9)) + " ms";
  }
  function fit(pen, text, room) {
    if (pen.measureText(text).width <= room) return text;
    let low = 0, high = text.length;
    while (low < high) { const mid = (low + high + 1) >> 1; if (pen.measureText(text.slice(0, mid) + "\u2026").width <= room) low = mid; else high = mid - 1; }
    return low ? text.slice(0, low) + "\u2026" : "";
  }
  function gridLines(pen, height) {
    pen.strokeStyle = colours.grid;
    pen.beginPath();
    for (const time of ticks()[0]) { const x = Math.round(xOf(time)) + 0.5; pen.moveTo(x, 0); pen.lineTo(x, height); }
    pen.stroke();
  }
  function label(pen, name, detail, y) {
    pen.textAlign = "left";
    pen.fillStyle = colours.text;
    pen.fillText(name, 14, y);
    pen.fillStyle = colours.faint;
    pen.fillText(fit(pen, detail, left() - 20), 14, y + 15);
  }
  function clip(pen, y, height, draw) {
    pen.save();
    pen.beginPath();
    pen.rect(left(), y, width() + 1, height);
    pen.clip();
    draw();
    pen.restore();
  }
  // A staircase of one value a step, the highest of those that share a pixel.
  function curve(pen, y, height, read, peak, colour, isFilled) {
    const [first, last] = stepsInView();
    if (first >= last || !peak) return;
    const points = [];
    for (let place = first; place < last; place++) {
      const x = Math.max(left() - 2, xOf(steps[place].planned_s)), value = read(steps[place]);
      const previous = points[points.length - 1];
      if (previous && x - previous[0] < 0.7) previous[1] = Math.max(previous[1], value);
      else points.push([x, value]);
    }
    // What the last step left is known until its end alone.
    const end = Math.min(left() + width() + 2, xOf(steps[last - 1].committed_s));
    const yOf = (value) => y + height - value / peak * (height - 2);
    pen.beginPath();
    points.forEach(([x, value], place) => {
      if (place) pen.lineTo(x, yOf(points[place - 1][1]));
      pen[place ? "lineTo" : "moveTo"](x, yOf(value));
    });
    pen.lineTo(end, yOf(points[points.length - 1][1]));
    pen.strokeStyle = colour;
    pen.lineWidth = 1.5;
    pen.stroke();
    pen.lineWidth = 1;
    if (!isFilled) return;
    pen.lineTo(end, y + height);
    pen.lineTo(points[0][0], y + height);
    pen.globalAlpha = 0.16;
    pen.fillStyle = colour;
    pen.fill();
    pen.globalAlpha = 1;
  }
  const most = (read) => steps.reduce((high, step) => Math.max(high, read(step)), 0);
  const mostRequests = most((step) => Math.max(step.num_running, step.num_waiting));
  const mostTokens = most((step) => step.num_decode_tokens + step.num_prefill_tokens);
  const mostUsage = most((step) => step.kv_usage);
  const bands = () => {
    const requests = AXIS + 6, kv = requests + CURVE + GAP, work = kv + CURVE + GAP;
    return { requests, kv, work, host: work + STEPS + 2 };
  };

  // What stays the same while a pointer moves is drawn once, aside.
  const still = document.createElement("canvas");
  function drawTop() {
    if (!isStillGood) { drawStill(); isStillGood = true; }
    const pen = prepare(top, TOP, top.parentElement.clientWidth);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.drawImage(still, 0, 0);
    const ratio = window.devicePixelRatio || 1;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (hover && hover.step >= 0) lightStep(pen, hover.step);
    crosshair(pen, TOP);
  }
  function lightStep(pen, place) {
    const band = bands(), step = steps[place], base = band.work + STEPS;
    const x = Math.max(left(), xOf(deviceStart[place])), end = Math.min(left() + width(), xOf(step.collected_s));
    const high = decodeHeight(step) + prefillHeight(step);
    if (end < x) return;
    pen.strokeStyle = colours.pick;
    pen.strokeRect(x - 0.5, base - high - 0.5, Math.max(1, end - x) + 1, high + 1);
  }
  function drawStill() {
    const pen = prepare(still, TOP, top.parentElement.clientWidth), band = bands();
    gridLines(pen, TOP);
    pen.fillStyle = colours.soft;
    pen.textAlign = "center";
    const [times, step] = ticks();
    for (const time of times) {
      const x = xOf(time);
      if (x > left() - 4 && x < left() + width() - 10) pen.fillText(tickText(time, step), x, AXIS / 2 + 1);
    }
    label(pen, "Requests", "", band.requests + 8);
    pen.fillStyle = colours.running;
    pen.fillText("\u25a0 running", 14, band.requests + 24);
    pen.fillStyle = colours.waiting;
    pen.fillText("\u25a0 waiting", 14, band.requests + 39);
    label(pen, "KV cache", `peak ${percent(mostUsage)} of ${number(data.num_pages)} pages`, band.kv + 14);
    label(pen, "Steps", `tokens, at most ${number(mostTokens)}`, band.work + 16);
    pen.fillStyle = colours.faint;
    pen.fillText("host", 14, band.host + HOST / 2);
    clip(pen, band.requests - 2, CURVE + 4, () => {
      curve(pen, band.requests, CURVE, (s) => s.num_running, mostRequests, colours.running, true);
      curve(pen, band.requests, CURVE, (s) => s.num_waiting, mostRequests, colours.waiting, false);
    });
    clip(pen, band.kv - 2, CURVE + 4, () => curve(pen, band.kv, CURVE, (s) => s.kv_usage, Math.max(mostUsage, 0.01), colours.kv, true));
    clip(pen, band.work, STEPS + HOST + 4, () => drawSteps(pen, band));
    pen.fillStyle = colours.faint;
    pen.textAlign = "right";
    pen.fillText(number(mostRequests), left() - 6, band.requests + 4);
    pen.strokeStyle = colours.line;
    pen.beginPath();
    for (const y of [band.requests + CURVE, band.kv + CURVE, band.work + STEPS]) { pen.moveTo(left(), y + 0.5); pen.lineTo(left() + width(), y + 0.5); }
    pen.stroke();
  }
  const tokenScale = (STEPS - 7) / Math.max(1, mostTokens);
  const decodeHeight = (step) => step.num_decode_tokens ? Math.max(4, step.num_decode_tokens * tokenScale) : 0;
  const prefillHeight = (step) => step.num_prefill_tokens ? Math.max(2, step.num_prefill_tokens * tokenScale) : 0;
  function fillAll(pen, colour, alpha, boxes) {
    pen.globalAlpha = alpha;
    pen.fillStyle = colour;
    for (const [x, y, wide, high] of boxes) pen.fillRect(x, y, wide, high);
    pen.globalAlpha = 1;
  }
  function drawSteps(pen, band) {
    const [first, last] = stepsInView(), base = band.work + STEPS;
    const decode = [], prefill = [], launch = [], host = [];
    // Steps that share a pixel are drawn as the highest of them.
    let column = null;
    const flush = () => {
      if (!column) return;
      if (column.decode) decode.push([column.x, base - column.decode, column.wide, column.decode]);
      if (column.prefill) prefill.push([column.x, base - column.decode - column.prefill, column.wide, column.prefill]);
      column = null;
    };
    let hostEnd = -1;
    const addHost = (from, to) => {
      if (to - hostEnd < 0.35) return;
      host.push([Math.max(from, hostEnd), band.host, Math.max(0.3, to - Math.max(from, hostEnd)), HOST]);
      hostEnd = to;
    };
    for (let place = first; place < last; place++) {
      const step = steps[place], x = xOf(deviceStart[place]), wide = Math.max(0.6, xOf(step.collected_s) - x - 0.4);
      const high = [decodeHeight(step), prefillHeight(step)];
      if (column && x - column.x < 0.8 && wide < 1) {
        if (high[0] + high[1] > column.decode + column.prefill) [column.decode, column.prefill] = high;
      } else {
        flush();
        column = { x, wide, decode: high[0], prefill: high[1] };
      }
      addHost(xOf(step.planned_s), xOf(step.scheduled_s));
      addHost(xOf(step.collected_s), xOf(step.committed_s));
      const from = xOf(step.scheduled_s), previous = launch[launch.length - 1];
      if (previous && from - previous[0] < 1.5) previous[2] = Math.max(previous[2], xOf(step.launched_s) - previous[0]);
      else launch.push([from, band.host + 2, xOf(step.launched_s) - from, HOST - 4]);
    }
    flush();
    fillAll(pen, colours.decode, 0.85, decode);
    fillAll(pen, colours.prefill, 0.85, prefill);
    fillAll(pen, colours.host, 0.22, launch);
    fillAll(pen, colours.host, 0.9, host);
  }
  function crosshair(pen, height) {
    if (!hover || hover.x < left()) return;
    pen.strokeStyle = colours.faint;
    pen.setLineDash([3, 3]);
    pen.beginPath();
    pen.moveTo(Math.round(hover.x) + 0.5, 0);
    pen.lineTo(Math.round(hover.x) + 0.5, height);
    pen.stroke();
    pen.setLineDash([]);
  }
  function drawLanes() {
    const all = shown.length * LANE + 8;
    spacer.style.height = all + "px";
    const height = Math.min(all, scroller.clientHeight || all, Math.round(window.innerHeight * 0.62));
    const pen = prepare(body, height, body.parentElement.clientWidth), offset = scroller.scrollTop;
    gridLines(pen, height);
    const first = Math.max(0, Math.floor(offset / LANE)), last = Math.min(shown.length, Math.ceil((offset + height) / LANE));
    for (let row = first; row < last; row++) drawLane(pen, row, row * LANE + 4 - offset);
    crosshair(pen, height);
  }
  function drawLane(pen, row, y) {
    const lane = lanes[shown[row]], isPicked = row === picked, isHover = hover && hover.row === row;
    if (row % 2) { pen.fillStyle = colours.stripe; pen.fillRect(0, y, left() + width() + 12, LANE); }
    if (isPicked || isHover) { pen.globalAlpha = isPicked ? 0.14 : 0.08; pen.fillStyle = colours.prefill; pen.fillRect(0, y, left() + width() + 12, LANE); pen.globalAlpha = 1; }
    pen.textAlign = "left";
    pen.fillStyle = isPicked || isHover ? colours.text : colours.soft;
    pen.fillText(fit(pen, titleOf(lane), left() - 28), 14, y + LANE / 2);
    clip(pen, y, LANE, () => {
      const bar = y + (LANE - BAR) / 2;
      for (const phase of lane.phases) drawPhase(pen, phase, bar);
      for (const chunk of lane.chunks) {
        if (chunk.end_s < view.start || chunk.start_s > view.end) continue;
        pen.fillStyle = colours.prefill;
        const x = xOf(chunk.start_s), wide = Math.max(1, xOf(chunk.end_s) - x - 0.5);
        pen.fillRect(x, bar, wide, BAR);
        const text = String(chunk.num_tokens);
        if (wide > 30 && wide > pen.measureText(text).width + 8) {
          pen.fillStyle = colours.panel;
          pen.fillText(text, Math.max(x, left()) + 4, bar + BAR / 2 + 0.5);
        }
      }
      if (lane.first_token_s !== null) dot(pen, xOf(lane.first_token_s), bar + BAR / 2);
      if (lane.outcome === "error" || lane.outcome === "timeout" || lane.outcome === "cancelled") cross(pen, xOf(endOf(lane)), bar + BAR / 2);
    });
  }
  function drawPhase(pen, phase, y) {
    if (phase.end_s < view.start || phase.start_s > view.end) return;
    const x = Math.max(left() - 2, xOf(phase.start_s)), end = Math.min(left() + width() + 2, xOf(phase.end_s));
    pen.fillStyle = colours[phase.kind];
    if (phase.kind === "queued") { pen.fillRect(x, y + BAR / 2 - 1.5, Math.max(1, end - x), 3); return; }
    pen.globalAlpha = phase.kind === "prefill" ? 0.35 : 0.92;
    pen.fillRect(x, phase.kind === "preempted" ? y + 3 : y, Math.max(1, end - x), phase.kind === "preempted" ? BAR - 6 : BAR);
    pen.globalAlpha = 1;
  }
  function dot(pen, x, y) {
    pen.beginPath();
    pen.arc(x, y, 3.25, 0, 7);
    pen.fillStyle = colours.panel;
    pen.fill();
    pen.strokeStyle = colours.text;
    pen.lineWidth = 1.5;
    pen.stroke();
    pen.lineWidth = 1;
  }
  function cross(pen, x, y) {
    pen.strokeStyle = colours.preempted;
    pen.lineWidth = 2;
    pen.beginPath();
    pen.moveTo(x - 4, y - 4); pen.lineTo(x + 4, y + 4);
    pen.moveTo(x + 4, y - 4); pen.lineTo(x - 4, y + 4);
    pen.stroke();
    pen.lineWidth = 1;
  }
  function redraw() {
    isStillGood = false;
    refresh();
  }
  // Draws what a pointer changes.
  function refresh() {
    if (isQueued) return;
    isQueued = true;
    requestAnimationFrame(() => { isQueued = false; drawTop(); drawLanes(); });
  }

  // --- what is under the pointer ---
  function stepAt(time) {
    const place = firstAfter(steps, time, "collected_s");
    return place < steps.length && deviceStart[place] <= time ? place : -1;
  }
  function describeStep(place) {
    const step = steps[place];
    return [`Step ${step.step_id}`, [
      ["device", seconds(step.collected_s - deviceStart[place])],
      ["plan", seconds(step.scheduled_s - step.planned_s)],
      ["launch", seconds(step.launched_s - step.scheduled_s)],
      ["commit", seconds(step.committed_s - step.collected_s)],
      ["prefill tokens", number(step.num_prefill_tokens)],
      ["decode tokens", number(step.num_decode_tokens)],
      ["rows", number(step.num_rows)],
      ["running, waiting", `${number(step.num_running)}, ${number(step.num_waiting)}`],
      ["KV cache", percent(step.kv_usage)],
    ]];
  }
  function describeLane(lane, time) {
    const facts = [];
    const phase = time === null ? undefined : lane.phases.find((p) => p.start_s <= time && time <= p.end_s);
    const chunk = time === null ? undefined : lane.chunks.find((c) => c.start_s <= time && time <= c.end_s);
    if (phase) facts.push(["now", `${phase.kind}, ${seconds(phase.end_s - phase.start_s)}${lane.is_cut && phase === lane.phases[0] ? " or longer" : ""}`]);
    if (phase && phase.note) facts.push(["why", phase.note]);
    if (chunk) facts.push(["chunk", `tokens ${number(chunk.start)} to ${number(chunk.start + chunk.num_tokens)}, step ${chunk.step_id}`]);
    facts.push(["waited", seconds(lane.is_cut ? null : waitedOf(lane))]);
    facts.push(["first token after", seconds(ttftOf(lane))]);
    facts.push(["total", seconds(endOf(lane) - startOf(lane))]);
    facts.push(["prompt", `${number(lane.num_prompt_tokens)} tokens, ${number(lane.num_cached_tokens)} from the cache`]);
    facts.push(["output", `${number(lane.num_output_tokens)} tokens`]);
    if (lane.num_preemptions) facts.push(["preempted", lane.num_preemptions === 1 ? "once" : `${lane.num_preemptions} times`]);
    facts.push(["outcome", outcomeOf(lane) + (lane.outcome === "cancelled" ? " (by its reader: an abort or a stop string)" : "")]);
    return [titleOf(lane), facts];
  }
  function showTip(described, x, y) {
    const tip = at("tip");
    tip.replaceChildren();
    element("b", described[0], tip);
    const table = element("table", undefined, tip);
    for (const [name, value] of described[1]) {
      const row = element("tr", undefined, table);
      element("th", name, row);
      element("td", value, row);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const beside = x + 16 + box.width > window.innerWidth ? x - box.width - 16 : x + 16;
    tip.style.left = Math.max(4, beside) + "px";
    tip.style.top = Math.max(4, Math.min(window.innerHeight - box.height - 4, y + 14)) + "px";
  }
  function letGo() { hover = null; at("tip").hidden = true; refresh(); }
  function point(event) {
    const canvas = event.currentTarget, box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top, time = timeOf(x);
    hover = { x, step: -1, row: -1 };
    let described = null;
    if (canvas === top) {
      const band = bands(), place = x < left() ? -1 : stepAt(time);
      if (place >= 0 && y > band.requests) { hover.step = place; described = describeStep(place); }
    } else {
      const row = Math.floor((y + scroller.scrollTop - 4) / LANE);
      if (row >= 0 && row < shown.length) {
        hover.row = row;
        const lane = lanes[shown[row]];
        const chunk = lane.chunks.find((c) => c.start_s <= time && time <= c.end_s);
        if (chunk) hover.step = steps.findIndex((step) => step.step_id === chunk.step_id);
        described = describeLane(lane, x < left() ? null : time);
      }
    }
    if (described) showTip(described, event.clientX, event.clientY); else at("tip").hidden = true;
    refresh();
  }

  // --- hands ---
  function pick(row) {
    picked = Math.max(-1, Math.min(shown.length - 1, row));
    for (const one of at("rows").children) one.classList.toggle("picked", picked >= 0 && Number(one.dataset.lane) === shown[picked]);
    if (picked >= 0) {
      const y = picked * LANE;
      if (y < scroller.scrollTop) scroller.scrollTop = y;
      if (y + LANE + 8 > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = y + LANE + 8 - scroller.clientHeight;
    }
    redraw();
  }
  function showPicked() {
    if (picked < 0) return;
    const box = scroller.getBoundingClientRect();
    showTip(describeLane(lanes[shown[picked]], null), box.left + left(), box.top + picked * LANE - scroller.scrollTop + LANE);
  }
  // Which lanes are shown: those that match, and where so chosen only what was there at the time in view.
  function choose() {
    const isPicked = shown[picked];
    const isNear = (place) => endOf(lanes[place]) >= view.start && startOf(lanes[place]) <= view.end;
    shown = at("near").checked ? matching.filter(isNear) : matching;
    picked = shown.indexOf(isPicked);
    at("empty").hidden = shown.length > 0;
  }
  function filter() {
    const text = at("filter").value.trim().toLowerCase();
    matching = lanes.map((_, place) => place).filter((place) => `${titleOf(lanes[place])} ${outcomeOf(lanes[place])}`.toLowerCase().includes(text));
    picked = -1;
    choose();
    isTableGood = false;
    letGo();
    redraw();
    fillTable();
  }
  function theme() {
    const root = document.documentElement;
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    readColours();
    redraw();
  }
  function help() {
    at("keys").hidden = !at("keys").hidden;
    at("help").setAttribute("aria-expanded", String(!at("keys").hidden));
  }
  const keys = {
    "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), "_": () => zoom(1.5),
    "ArrowLeft": () => move(-0.2), "ArrowRight": () => move(0.2),
    "ArrowUp": () => { pick(Math.max(0, picked - 1)); showPicked(); }, "ArrowDown": () => { pick(picked + 1); showPicked(); },
    "Enter": () => { if (picked >= 0) zoomToLane(shown[picked]); },
    "0": () => look(0, whole), "Home": () => look(0, whole), "t": theme, "?": help,
    "v": () => { at("near").checked = !at("near").checked; choose(); redraw(); },
    "/": () => at("filter").focus(),
    "Escape": () => { at("tip").hidden = true; pick(-1); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isTyping = event.target === at("filter");
    if (isTyping) { if (event.key === "Escape") { at("filter").value = ""; filter(); at("chart").focus(); } return; }
    // Buttons and the table keep their own keys.
    if (event.key === "Enter" && event.target !== document.body && event.target !== at("chart")) return;
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  function wheel(event) {
    const x = event.clientX - top.getBoundingClientRect().left;
    if (event.ctrlKey || event.metaKey || event.currentTarget === top && Math.abs(event.deltaY) > Math.abs(event.deltaX)) {
      event.preventDefault();
      zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY * 0.003))), timeOf(x));
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      move((event.deltaX || event.deltaY) / width());
    }
  }
  const pointers = new Map();
  for (const canvas of [top, body]) {
    canvas.addEventListener("wheel", wheel, { passive: false });
    canvas.addEventListener("pointerleave", letGo);
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      pointers.set(event.pointerId, event.clientX);
      canvas.setPointerCapture(event.pointerId);
      at("chart").classList.add("moving");
      if (canvas === body) pick(Math.floor((event.clientY - body.getBoundingClientRect().top + scroller.scrollTop - 4) / LANE));
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (before === undefined) { point(event); return; }
      const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, x]) => x);
      pointers.set(event.pointerId, event.clientX);
      if (others.length) {
        const was = Math.abs(before - others[0]), is = Math.abs(event.clientX - others[0]);
        if (was > 8 && is > 8) zoom(was / is, timeOf((event.clientX + others[0]) / 2 - top.getBoundingClientRect().left));
      } else {
        move((before - event.clientX) / width());
      }
    });
    const release = (event) => { pointers.delete(event.pointerId); at("chart").classList.toggle("moving", pointers.size > 0); };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("dblclick", (event) => {
      const time = timeOf(event.clientX - top.getBoundingClientRect().left);
      const place = stepAt(time);
      if (canvas === body && picked >= 0) zoomToLane(shown[picked]);
      else if (canvas === top && place >= 0) zoomTo(deviceStart[place], steps[place].collected_s);
    });
  }
  at("zoom-in").addEventListener("click", () => zoom(1 / 1.5));
  at("zoom-out").addEventListener("click", () => zoom(1.5));
  at("fit").addEventListener("click", () => look(0, whole));
  at("theme").addEventListener("click", theme);
  at("help").addEventListener("click", help);
  at("filter").addEventListener("input", filter);
  // Of many, what is elsewhere in time only gets in the way.
  at("near").checked = lanes.length > 200;
  at("near").addEventListener("change", () => { choose(); redraw(); });
  scroller.addEventListener("scroll", refresh);
  new ResizeObserver(() => { measure(); redraw(); }).observe(at("chart"));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const follow = () => { document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; readColours(); redraw(); };
  dark.addEventListener("change", follow);

  measure();
  fillHead();
  at("table-box").addEventListener("toggle", fillTable);
  choose();
  follow();
  // What is shown, for whoever drives the page.
  window.traceView = () => ({ start_s: view.start, end_s: view.end, picked, shown: shown.map((place) => titleOf(lanes[place])) });
})();
