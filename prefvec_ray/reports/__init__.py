"""What people look at: the Markdown report, the page, the plots."""
