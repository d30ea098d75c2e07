"""Programs. Started beside a foreign package of one of our names, they say so and stop."""

import sys

from launchers.shadowed import shadowed

if _wrong := shadowed(("conf", "merging", "tasks")):
    sys.exit(_wrong)
