"""A module that cannot be imported."""

raise RuntimeError("the extension was built for another version")
