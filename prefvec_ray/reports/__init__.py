"""The Markdown report, the HTML page and the plots."""

from prefvec_ray.common.extras import require

require("report", "matplotlib", "markdown")
