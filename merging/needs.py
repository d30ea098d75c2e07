"""The words for what a method looks at beside weights; nothing is imported for them."""

NEEDS = ("nothing", "inputs", "labels")  # each more than the one before
LABELS = " with labels"  # behind the name of who opened a split, where labels were opened
