"""Examples in docstrings become blocks of code on the site (`extensions` in mkdocs.yml)."""

import re

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)
"""From the first prompt to the next empty line."""


class Doctests(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            fenced = lambda found: f"{found[1]}```python\n{found[0]}\n{found[1]}```"
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)
