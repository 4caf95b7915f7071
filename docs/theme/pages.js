// Tables and blocks that scroll sideways can be reached and scrolled by keyboard.
const reachable = () => {
  for (const each of document.querySelectorAll(".md-typeset__scrollwrap, .jp-RenderedText, .highlight, .highlight-ipynb, pre > code")) {
    each.tabIndex = 0;
  }
};
reachable();
new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true });
