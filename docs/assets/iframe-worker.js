// Browsers start no worker for a page that was opened from a file system. The search of the site then runs in a hidden frame,
// which gets the script of the worker and answers with messages as a worker does.
if (location.protocol === "file:" && !window.IFrameWorker) {
  window.IFrameWorker = class extends EventTarget {
    constructor(script) {
      super();
      this.onmessage = this.onerror = null;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise(done => { this.frame.onload = done; });
      addEventListener("message", event => {
        if (event.source !== this.frame.contentWindow) return;
        const answer = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(answer);
        if (this.onmessage) this.onmessage(answer);
      });
      document.body.appendChild(this.frame);
      const page = this.frame.contentDocument;
      page.open();
      page.write(
        "<script>" +
        "postMessage = message => parent.dispatchEvent(new MessageEvent('message', { data: message, source: window }));" +
        "function importScripts() {" +
        "  return [...arguments].reduce((before, url) => before.then(() => new Promise((done, failed) => {" +
        "    const script = document.createElement('script');" +
        "    script.src = url; script.onload = done; script.onerror = failed; document.body.appendChild(script);" +
        "  })), Promise.resolve());" +
        "}" +
        "</" + "script><body><script src='" + script + "'></" + "script></body>"
      );
      page.close();
    }
    postMessage(message) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: message })));
    }
    terminate() { this.frame.remove(); }
  };
  window.Worker = window.IFrameWorker;
}
