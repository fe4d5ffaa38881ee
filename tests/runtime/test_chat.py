"""Chat templates: the text they give, and that strangers' templates reach nothing."""

from __future__ import annotations

import pytest
from graphwright.passes.errors import InputError
from graphwright.runtime.chat import render

MESSAGES = [{"role": "user", "content": "Hello <there> ü"}]


def test_messages_become_text() -> None:
    """Blocks on lines of their own leave no empty lines, as templates expect."""
    template = (
        "{% for message in messages %}\n    {% if message.role == 'user' %}\n"
        "[{{ message['content'] }}]{{ eos_token }}\n    {% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}answer:{% endif %}"
    )
    assert render(template, MESSAGES, {"eos_token": "</s>"}) == "[Hello <there> ü]</s>\nanswer:"


def test_what_templates_of_transformers_use() -> None:
    template = (
        "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}{{ strftime_now('%Y')[:2] }}{{ nothing_given }}"
    )
    assert render(template, MESSAGES * 2, {}) == '{"role": "user", "content": "Hello <there> ü"}20'


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ strftime_now.__closure__[0] }}",
        "{% for a in range(10000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content.upper() }}",
    ],
)
def test_a_template_that_reaches_out_or_fails_is_one_line(template: str) -> None:
    message = r"^the model's chat template cannot be used \(.+\); leave out --chat"
    with pytest.raises(InputError, match=message) as caught:
        render(template, MESSAGES, {})
    assert "\n" not in str(caught.value)


def test_a_template_may_refuse_with_its_own_words() -> None:
    with pytest.raises(InputError, match="cannot be used \\(only two roles\\)"):
        render("{{ raise_exception('only two roles') }}", MESSAGES, {})
