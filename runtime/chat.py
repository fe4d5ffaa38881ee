"""A conversation as the text that a model was trained on, by the chat template that its file carries.

Templates come from strangers' files: they run in jinja2's sandbox, which lets them change nothing and reach nothing.
The surroundings are those of Hugging Face's transformers, which templates are written for.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..passes.errors import InputError, first_line


def render(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """messages: role and content of each, in order. The text ends where the model's answer begins.

    Raises InputError when the template is not valid, or refuses the messages.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:  # jinja2's own writes < as \\u003c, for web pages
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    values = {**special_tokens, "messages": [dict(one) for one in messages], "add_generation_prompt": True}
    try:
        return environment.from_string(template).render(values)
    except Exception as error:  # a template can fail as any program can
        raise InputError(
            f"the model's chat template cannot be used ({first_line(error) or type(error).__name__}); "
            "leave out --chat and write the prompt as the model expects it"
        ) from error
