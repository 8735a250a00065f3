"use strict";
// The report's script: clips on one clock, the wipe, and the values of plots and maps.
// Everything it shows is in the page already; without it the tables and drawings still stand.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const main = document.getElementById("main");
  const frames = Number(main.dataset.frames);
  const fps = Number(main.dataset.fps);
  const NEAR = 0.1 / fps; // seconds: no drift to speak of
  const FAR = Math.max(0.5 / fps, 0.1); // seconds: too far to catch up by speed
  const SETTLE = 1000; // milliseconds

  // ---- Videos -----------------------------------------------------------------------------
  const addresses = new Map();

  function address(id) {
    if (!addresses.has(id)) {
      const text = atob(document.getElementById(id).textContent);
      const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
      addresses.set(id, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
    }
    return addresses.get(id);
  }

  /** The first of some events; "emptied" ends every wait for a video that is unloaded meanwhile. */
  const first = (target, ...names) =>
    new Promise((done) => {
      const until = new AbortController();
      const end = () => (until.abort(), done());
      for (const name of names) target.addEventListener(name, end, { signal: until.signal });
    });

  async function load(video) {
    if (!video.src) video.src = address(video.dataset.source);
    while (video.src && !video.error && video.readyState < HTMLMediaElement.HAVE_METADATA) {
      await first(video, "loadedmetadata", "error", "emptied");
    }
  }

  function unload(video) {
    if (!video.src) return;
    video.removeAttribute("src");
    video.load();
  }

  function cannotPlay(video) {
    const note = document.createElement("p");
    note.className = "missing";
    note.textContent = "this browser cannot play H.264 video";
    video.replaceWith(note);
  }

  async function seek(video, time) {
    if (video.readyState < HTMLMediaElement.HAVE_METADATA) return;
    if (Math.abs(video.currentTime - time) < 1e-4 && !video.seeking) return;
    video.currentTime = time;
    await first(video, "seeked", "error", "emptied");
  }

  const corrected = new WeakMap(); // video -> when its time was last set

  /**
   * Bring a playing clip to the master's time. A small drift goes by a little more or less speed;
   * a larger one by setting the time, which costs a seek: the clip is then given a second to
   * catch up with what the seek itself took.
   */
  function bringBack(video, time) {
    if (video.seeking) return;
    const late = time - video.currentTime;
    const now = performance.now();
    if (Math.abs(late) > FAR && now - (corrected.get(video) ?? -SETTLE) >= SETTLE) {
      corrected.set(video, now);
      video.currentTime = time;
    } else {
      const off = Math.abs(late) > NEAR;
      video.playbackRate = off ? 1 + Math.max(-0.5, Math.min(0.5, 5 * late)) : 1;
    }
  }

  // ---- A row: the clips of one prompt and seed, on the clock of the first (dense) -----------
  class Row {
    constructor(element) {
      this.element = element;
      this.stage = element.querySelector(".stage");
      this.timeline = element.querySelector(".timeline");
      this.output = element.querySelector(".frame");
      this.button = element.querySelector(".play");
      this.wipe = element.querySelector(".wipe input");
      this.frame = 0;
      this.near = false;
      this.held = false; // the reader paused this row: it does not start by itself
      this.playing = false;
      this.wanted = null; // what to show once the seek under way is done
      this.listen();
    }

    get videos() {
      return all("figure:not([hidden]) video", this.stage);
    }

    listen() {
      this.element.querySelector(".transport").hidden = frames < 2; // pictures have no time
      this.button.addEventListener("click", () => this.toggle());
      this.element.querySelector(".back").addEventListener("click", () => this.step(-1));
      this.element.querySelector(".on").addEventListener("click", () => this.step(1));
      this.timeline.addEventListener("input", () => this.scrub(Number(this.timeline.value)));
      this.wipe.addEventListener("input", () => this.moveWipe());
      this.moveWipe();
      for (const video of all("video", this.element)) {
        video.addEventListener("error", () => video.src && cannotPlay(video));
        video.addEventListener("ended", () => this.ended(video));
      }
    }

    moveWipe() {
      this.stage.style.setProperty("--wipe", `${this.wipe.value}%`);
      this.wipe.setAttribute("aria-valuetext", `${this.wipe.value} % of the picture is dense`);
    }

    toggle() {
      this.held = this.playing;
      if (this.playing) this.pause();
      else this.play();
    }

    step(by) {
      this.scrub((this.frame + by + frames) % frames);
    }

    scrub(frame) {
      this.held = true;
      this.pause();
      this.show(frame);
    }

    /** Put every clip on one frame; of many calls in a row the last one counts. */
    async show(frame) {
      this.report(frame);
      const underWay = this.wanted !== null;
      this.wanted = { frame }; // each call a new one: the clips may have changed, too
      if (underWay) return;
      let done;
      do {
        done = this.wanted;
        await this.align(done.frame);
      } while (done !== this.wanted);
      this.wanted = null;
    }

    /** The middle of a frame, so that rounding never shows its neighbour. */
    async align(frame) {
      await Promise.all(this.videos.map(load));
      await Promise.all(this.videos.map((video) => seek(video, (frame + 0.5) / fps)));
    }

    async play() {
      if (this.playing) return;
      this.setPlaying(true);
      await this.start(this.frame >= frames - 1 ? 0 : this.frame);
    }

    async start(frame) {
      this.report(frame);
      const round = (this.round = {});
      await this.align(frame);
      if (!this.playing || this.round !== round) return;
      const videos = this.videos;
      await Promise.allSettled(videos.map((video) => video.play()));
      if (this.playing && this.round === round && videos.length) this.follow(videos, round);
    }

    pause() {
      this.setPlaying(false);
      for (const video of this.videos) video.pause();
    }

    ended(video) {
      if (this.playing && video === this.videos[0]) this.start(0);
    }

    setPlaying(playing) {
      this.playing = playing;
      this.button.classList.toggle("playing", playing);
      this.button.setAttribute("aria-label", playing ? "Pause" : "Play");
    }

    /** At each new frame of the master, bring back the clips that have drifted. */
    follow(videos, round) {
      const [master, ...others] = videos;
      const tick = () => {
        if (!this.playing || this.round !== round) return;
        const time = master.currentTime;
        if (!master.ended) for (const other of others) bringBack(other, time);
        this.report(Math.min(Math.floor(time * fps), frames - 1));
        next();
      };
      const next = () =>
        master.requestVideoFrameCallback
          ? master.requestVideoFrameCallback(tick)
          : requestAnimationFrame(tick);
      tick();
    }

    report(frame) {
      this.frame = frame;
      this.timeline.value = frame;
      const text = `frame ${frame + 1} of ${frames}`;
      this.timeline.setAttribute("aria-valuetext", text);
      this.output.textContent = text;
    }

    /** Show the figures that the toolbar asks for, on the frame where the row is. */
    arrange(profile, view, difference) {
      for (const twin of all(".twin", this.stage)) {
        const name = twin.dataset.profile;
        twin.hidden = name !== "dense" && name !== profile && profile !== "*";
        for (const figure of all("figure", twin)) {
          figure.hidden = twin.hidden || (!difference && figure.matches(".difference"));
          if (figure.hidden) all("video", figure).forEach(unload);
        }
      }
      // Without two videos there is nothing to wipe between.
      const both = all(".take:not([hidden]) video", this.stage).length === 2;
      this.stage.dataset.view = view === "wipe" && !both ? "pair" : view;
      const label = `Wipe between dense (left) and ${profile} (right)`;
      this.wipe.setAttribute("aria-label", label);
      this.stage.dataset.columns = this.columns();
      this.stage.style.setProperty("--columns", this.columns());
      if (this.near) this.refresh();
    }

    columns() {
      const { view } = this.stage.dataset;
      const boxes = all(view === "all" ? ".twin" : "figure", this.stage);
      const count = boxes.filter((box) => !box.hidden).length;
      if (view === "all" && count > 5) return Math.ceil(count / Math.ceil(count / 5));
      return view === "wipe" ? count - 1 : count; // a wipe has two in one place
    }

    refresh() {
      if (this.playing) this.start(this.frame);
      else this.show(this.frame);
    }

    approach(near) {
      this.near = near;
      if (near) return this.refresh();
      this.pause();
      all("video", this.element).forEach(unload);
    }
  }

  // ---- The toolbar: what every row shows ----------------------------------------------------
  const rows = all("article.clip").map((element) => new Row(element));
  const byElement = new Map(rows.map((row) => [row.element, row]));
  const toolbar = document.querySelector(".toolbar");
  const allButton = toolbar.querySelector(".all");
  let still = matchMedia("(prefers-reduced-motion: reduce)").matches;

  function arrange() {
    const choice = new FormData(toolbar);
    const profile = choice.get("profile") ?? "*";
    for (const input of all('[name="view"]', toolbar)) input.disabled = profile === "*";
    const view = profile === "*" ? "all" : choice.get("view");
    for (const row of rows) row.arrange(profile, view, choice.has("difference"));
  }

  function setStill(value) {
    still = value;
    allButton.textContent = still ? "Play all" : "Pause all";
  }

  toolbar.hidden = false;
  allButton.hidden = frames < 2;
  // It stays in sight while it leaves most of the window to the clips.
  function fitToolbar() {
    const loose = toolbar.offsetHeight > innerHeight / 5;
    toolbar.classList.toggle("loose", loose);
    main.style.setProperty("--toolbar", `${loose ? 0 : toolbar.offsetHeight}px`);
  }
  new ResizeObserver(fitToolbar).observe(toolbar);
  addEventListener("resize", fitToolbar);
  toolbar.addEventListener("change", arrange);
  toolbar.addEventListener("submit", (event) => event.preventDefault());
  allButton.addEventListener("click", () => {
    setStill(!still);
    for (const row of rows) {
      row.held = still;
      if (still) row.pause();
      else if (row.seen && frames > 1) row.play();
    }
  });
  setStill(still);
  arrange();

  // A link to a clip also chooses the profile that it is about.
  for (const link of all("a[data-show]")) {
    link.addEventListener("click", () => {
      const input = all('[name="profile"]', toolbar).find((i) => i.value === link.dataset.show);
      if (input) input.checked = true;
      arrange();
    });
  }

  // Only rows near the window hold decoders, and only rows in it play by themselves.
  const nearby = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) byElement.get(entry.target).approach(entry.isIntersecting);
    },
    { rootMargin: "500px 0px" },
  );
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const row = byElement.get(entry.target.closest("article"));
        row.seen = entry.isIntersecting;
        if (!row.seen) row.pause();
        else if (!still && !row.held && frames > 1) row.play();
      }
    },
    { threshold: 0.35 },
  );
  for (const row of rows) {
    nearby.observe(row.element);
    seen.observe(row.stage);
  }

  // ---- Plots --------------------------------------------------------------------------------
  const choice = document.querySelector("[data-plots]");
  function showPlot() {
    const chosen = new Set(all("input:checked", choice).map((input) => input.value));
    for (const plot of all(".plot")) plot.hidden = !chosen.has(plot.dataset.plot);
  }
  if (choice) {
    choice.hidden = false;
    choice.addEventListener("change", showPlot);
    showPlot();
  }
  for (const plot of all(".plot")) {
    const readout = plot.querySelector(".readout");
    const hint = readout.textContent;
    for (const point of all(".point", plot)) {
      const tell = () => (readout.textContent = point.getAttribute("aria-label"));
      const forget = () => (readout.textContent = hint);
      point.addEventListener("focus", tell);
      point.addEventListener("pointerenter", tell);
      point.addEventListener("blur", forget);
      point.addEventListener("pointerleave", forget);
    }
  }

  // ---- Maps ---------------------------------------------------------------------------------
  const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  function explore(map) {
    const picture = map.querySelector("svg");
    const cursor = map.querySelector(".cursor");
    const readout = map.querySelector("output");
    const summary = readout.textContent;
    const data = JSON.parse(map.querySelector(".map-data").textContent);
    let place = null;

    function point(row, column) {
      const line = data.values[Math.max(0, Math.min(row, data.values.length - 1))];
      place = [data.values.indexOf(line), Math.max(0, Math.min(column, line.length - 1))];
      const value = line[place[1]] ?? "no value";
      readout.textContent = `${data.layers[place[0]]}, step ${place[1] + 1}: ${value}`;
      cursor.setAttribute("x", data.left + place[1] * data.width);
      cursor.setAttribute("y", place[0] * data.height);
      cursor.setAttribute("visibility", "visible");
    }

    function leave() {
      readout.textContent = summary;
      cursor.setAttribute("visibility", "hidden");
    }

    picture.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY);
      const { x, y } = at.matrixTransform(picture.getScreenCTM().inverse());
      const row = Math.floor(y / data.height);
      const column = Math.floor((x - data.left) / data.width);
      if (data.values[row]?.[column] === undefined) leave();
      else point(row, column);
    });
    picture.addEventListener("pointerleave", leave);
    picture.addEventListener("blur", leave);
    picture.addEventListener("focus", () => point(...(place ?? [0, 0])));
    picture.addEventListener("keydown", (event) => {
      const move = MOVES[event.key];
      if (!move) return;
      event.preventDefault();
      point(...(place ?? [0, 0]).map((at, axis) => at + move[axis]));
    });
  }
  all(".map").forEach(explore);
})();
