"""The Markdown report, the HTML page and the plots."""
