"""Programs. Started beside a foreign package of one of our names, they say so and stop."""

import sys

from duet_merging import PACKAGES, shadowed

if _wrong := shadowed(PACKAGES[1:]):
    sys.exit(_wrong)
