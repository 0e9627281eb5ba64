// The widget manager speaks MathJax 2 (Hub.Queue(["Typeset", Hub, element])); the book serves MathJax 3.
// Each request is handed on to MathJax 3 as soon as it has started.
(function () {
  function whenReady(work) {
    const mathjax = window.MathJax;
    if (mathjax && mathjax.startup && mathjax.startup.promise && mathjax.typesetPromise) {
      mathjax.startup.promise.then(work);
    } else if (document.querySelector('script[src*="mathjax/"]')) {
      setTimeout(() => whenReady(work), 50); // asked for, not there yet
    } // else: a page without mathematics, nothing to typeset
  }
  const hub = {
    Queue(...calls) {
      for (const call of calls) {
        const element = Array.isArray(call) ? call[2] : null;
        if (element) whenReady(() => window.MathJax.typesetPromise([element]));
      }
    },
    Register: { StartupHook() {} },
    Config() {},
    Configured() {},
  };
  // window.MathJax may be replaced by MathJax 3 when it starts: give it its Hub then, too.
  let current = window.MathJax || {};
  current.Hub = current.Hub || hub;
  Object.defineProperty(window, "MathJax", {
    configurable: true,
    get: () => current,
    set: (value) => {
      current = value;
      if (current && !current.Hub) current.Hub = hub;
    },
  });
})();
