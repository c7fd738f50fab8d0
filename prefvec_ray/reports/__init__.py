"""What people look at: the Markdown report, the page, the plots."""

from prefvec_ray.common.extras import require

require("report", "matplotlib", "markdown")
