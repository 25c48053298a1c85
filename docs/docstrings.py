"""Lets the reference show a docstring's section `Example:` as code, as it shows `Examples:`."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Renames the section."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
