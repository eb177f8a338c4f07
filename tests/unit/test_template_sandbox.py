"""Chat templates: what they can do, and that nothing they do takes all time, memory or control."""

import resource
from datetime import datetime

import jinja2
import pytest

from kvarn.errors import RequestError, TemplateError
from kvarn.text.template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]
BIG = "{% set big = 'a' * 1000000 %}"
GROW = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
MEMORY_MIB = 200


def render(source, messages=USER, **options):
    return ChatTemplate({"default": source}).render(messages, **options)


HOSTILE = {
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat list": BIG + "{{ [big, big] * 100000 }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
    "filtered loop": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "lazy filters": "{% for a in range(100000) %}{% for b in range(99999)|map('string')|reject('eq', '') %}"
    "{% endfor %}{% endfor %}",
    "doubled by ~": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by a block": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set t %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = t %}{% endfor %}",
    "doubled list": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested lists": GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested tuples": GROW + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x | tojson }}",
    "nested objects": GROW + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
    "nested by dict()": GROW + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "nested views": "{% set ns = namespace(x={'a': 1}) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x.items(), 'b': ns.x.items()} %}{% endfor %}{{ ns.x }}",
    "nested arguments": "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
    "nested keywords": "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = kwargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ f(a=ns.x, b=ns.x) }}{% endfor %}{{ ns.x }}",
    "deep list": GROW.replace("60", "99") + "{% set ns.x = [ns.x] %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "long number": "{{ ('9' * 4000) | int }}",
    "% width": "{{ '%1000000000d' % 1 }}",
    "% star": "{{ '%*d' % (1000000000, 1) }}",
    "% precision": "{{ '%.1000000000f' % 1 }}",
    "% named": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "% repeated": BIG + "{{ ('%(a)s' * 1000) % {'a': big} }}",
    "% filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format nested": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format repeated": BIG + "{{ ('{0}' * 10000).format(big) }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ 'a' | center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "replace": BIG + "{{ big.replace('a', big) }}",
    "replace nothing": BIG + "{{ big.replace('', big) }}",
    "replace filter": BIG + "{{ big | replace('a', big) }}",
    "join": BIG + "{{ big.join(range(100000) | map('string')) }}",
    "join filter": BIG + "{{ range(100000) | join(big) }}",
    "map": BIG + "{{ range(100000) | map('replace', '', big) | list }}",
    "indent": "{{ 'a' | indent(10**9) }}",
    "tojson indent": "{{ [1] | tojson(indent=10**9) }}",
    "sum of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) | length }}",
    "many strings": BIG + "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [big ~ i] %}"
    "{% endfor %}",
    "much output": BIG + "{% for i in range(100000) %}{{ big }}{% endfor %}",
    "searches": "{% set l = range(200000) | list %}{% for i in range(99999) %}{% if -1 in l %}{% endif %}{% endfor %}",
    "tests": "{% set l = range(200000) | list %}{% for i in range(99999) %}{% set x = -1 is in l %}{% endfor %}",
    "sorts": "{% for i in range(99999) %}{% set x = range(100000) | sort %}{% endfor %}",
    "macro recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "block recursion": "{% block a %}{{ self.a() }}{% endblock %}",
    "nested source": "{% if 1 %}" * 400 + "{% endif %}" * 400,
    "nested expression": "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
    "long expression": "{{ 1" + "+1" * 20_000 + " }}",
    "long source": "a" * (300 << 10),
    "wide time": "{{ strftime_now('%1000000000d') }}",
    "bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "class method": "{{ dict.fromkeys(range(1000)) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateError):
        render(HOSTILE[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_MIB << 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_pythons_inside_is_out_of_reach(source):
    try:
        text = render(source)
    except TemplateError:
        return
    assert text == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% set messages[0].role = 'x' %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
    ],
)
def test_what_it_is_given_stays_as_it_is(source):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(TemplateError):
        render(source, messages)
    assert messages == USER


def test_large_conversations_have_room():
    """The bounds grow with the conversation."""
    source = (
        "{% for message in messages %}{% set content = message.content | trim %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' ~ message.role ~ '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    )
    many = [{"role": "user", "content": "x" * 100}] * 5000
    assert len(render(source, many)) > 500_000
    assert len(render(source, [{"role": "user", "content": "x" * 5_000_000}])) > 5_000_000


SAME_AS_JINJA = [
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
    "{{ messages | map(attribute='role') | unique | list }} {{ messages | length }} {{ messages[1:] | length }}",
    "{{ messages[::-1] | map(attribute='role') | first }} {{ (messages | last).role }}",
    "{% set ns = namespace(a=0) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
    "{% macro show(m, mark='-') %}{{ mark ~ m.content ~ mark }}{% endmacro %}{{ show(messages[0], mark='*') }}",
    "{% set block %}x{{ messages[0].role }}{% endset %}{{ block | upper }}",
    "{{ messages[0] is mapping }} {{ messages is sequence }} {{ x is defined }} {{ 'a' in 'abc' }} {{ 3 not in [1] }}",
    "{{ messages[0].items() | list }} {{ messages[0].keys() | list }} {{ messages[0] | dictsort }}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "{{ 'a,b,c'.split(',') }} {{ '  x '.strip() }} {{ 'x'.startswith('x') }} {{ 'abc'[1:] }} {{ 'A b'.lower() }}",
    "{{ 'a-b'.replace('-', '+') }} {{ 'a-b' | replace('-', '+') }}",
    "{{ '{} {x}'.format(1, x=2) }} {{ '%s %02d' % (1, 2) }}",
    "{{ '%s=%d' | format('a', 3) }} {{ [1, 2] | sum }} {{ messages | sum(attribute='n') }} {{ [3, 1] | sort }}",
    "{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent(1, blank=true) }}",
    "{{ [1, 2] | join }} {{ messages | join('-', attribute='role') }}",
    "{{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 5 }} {{ -3 | abs }} {{ 7 / 2 }} {{ '7' | int + 1 }} {{ '1.5' | float }}",
    "{{ none | default('x', true) }} {{ undefined_thing }} {{ 'yes' if not undefined_thing else 'no' }}",
    "  {%- if true -%}  a  {%- endif %}\n   {% if true %}\nb\n   {% endif %}\nc",
    "{{ messages | groupby('role') | map(attribute='grouper') | list }} {{ 'hello world' | title | trim('H') }}",
    "{{ {'a': [1, 2]} }} {{ (1, 'x') }} {{ [none, true] }} {{ 1 if messages else 2 }} {{ 1 == 1.0 and 'b' > 'a' }}",
    "{% for i in range(3, 0, -1) %}{{ i }}{{ loop.cycle('a', 'b') }}{{ ', ' if not loop.last }}{% endfor %}",
    "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is sequence else a }}{% endfor %}",
    "{% macro outer() %}[{{ caller('x') }}]{% endmacro %}{% call(v) outer() %}{{ v }}!{% endcall %}",
]


@pytest.mark.parametrize("source", SAME_AS_JINJA)
def test_ordinary_templates_render_as_jinja_would(source):
    messages = [{"role": r, "content": c, "n": n} for r, c, n in [("user", "hi", 1), ("assistant", "Hello", 2)]]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert render(source, messages) == plain.from_string(source).render(messages=messages)


def test_json_is_plain():
    """As transformers has it: no escapes for HTML, other scripts as they are."""
    messages = [{"role": "user", "content": "<é'&>", "x": {"b": [1, None], "a": True}}]
    assert render("{{ messages[0] | tojson }}", messages) == (
        '{"role": "user", "content": "<é\'&>", "x": {"b": [1, null], "a": true}}'
    )
    assert render("{{ messages[0].x | tojson(indent=2, sort_keys=true) }}", messages) == (
        '{\n  "a": true,\n  "b": [\n    1,\n    null\n  ]\n}'
    )
    assert render("{{ 'é' | tojson(ensure_ascii=true) }}") == '"\\u00e9"'
    assert render("{{ {'a': 1} | tojson(separators=(',', ':')) }}") == '{"a":1}'


def test_generation_marks_nothing():
    body = "{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}"
    assert render(f"{{% for m in messages %}}a{body}{{{{ x }}}}{{% endfor %}}") == "ahi"


def test_time_is_the_clocks():
    template = ChatTemplate({"default": "{{ strftime_now('%d %b %Y') }}"}, now=lambda: datetime(2024, 7, 26))
    assert template.render(USER) == "26 Jul 2024"


def test_a_refusal_is_told():
    with pytest.raises(TemplateError, match="refuses the messages: no system please"):
        render("{{ raise_exception('no system please') }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "line 1: Expected an expression"),
        ("a\n{{ x | nosuch }}", "line 2: No filter named 'nosuch'"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
    ],
)
def test_faults_are_told(source, message):
    with pytest.raises(TemplateError, match=message):
        render(source)


def test_variables_are_the_templates():
    source = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{{ bos_token }}"
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"})
    assert template.render(USER) == "<s>"
    assert template.render(USER, variables={"enable_thinking": False}) == "False<s>"
    with pytest.raises(RequestError, match=r"'other' is no variable .* enable_thinking") as caught:
        template.render(USER, variables={"other": 1})
    assert caught.value.field == "chat_template_kwargs.other"
    with pytest.raises(RequestError, match="no variable"):
        template.render(USER, variables={"messages": []})


def test_tools_need_a_place():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert render("{% if tools %}{{ tools[0].function.name }}{% endif %}", tools=tools) == "f"
    with pytest.raises(RequestError, match="no place for tools"):
        render("{{ messages[0].content }}", tools=tools)
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }} tool"})
    assert (template.render(USER), template.render(USER, tools=tools)) == ("plain", "1 tool")


def test_a_default_template_is_needed():
    with pytest.raises(TemplateError, match="rag"):
        ChatTemplate({"rag": "x"})
