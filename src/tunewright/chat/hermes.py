"""Functions, calls and results in the Hermes format, for templates without a tool form.

The format is that of NousResearch's Hermes 2 Pro and later: declarations in ``<tools>``, calls in ``<tool_call>``,
results in ``<tool_response>``, all of them text in turns that every template has. It is a Jinja source in front of the
base's own, so that exported files render conversations with functions as training did.
"""

from __future__ import annotations

_PRELUDE = """\
{%- if tools %}
    {%- set hermes = namespace(turns=[], results=[], declared='') %}
    {%- for tool in tools %}
        {%- set hermes.declared = hermes.declared ~ (tool | tojson) ~ '\\n' %}
    {%- endfor %}
    {%- set hermes.declared = 'You may call functions. Their signatures are in <tools></tools>:\\n<tools>\\n'
        ~ hermes.declared
        ~ '</tools>\\nWrite each call as a JSON object with its name and arguments in <tool_call></tool_call>:\\n'
        ~ '<tool_call>\\n{"name": <function name>, "arguments": <object of arguments>}\\n</tool_call>' %}
    {%- if messages[0]['role'] == 'system' %}
        {%- set hermes.declared = messages[0]['content'] ~ '\\n\\n' ~ hermes.declared %}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {%- set hermes.turns = [{'role': 'system', 'content': hermes.declared}] %}
    {%- for message in messages %}
        {%- if message['role'] == 'tool' %}
            {%- set hermes.results = hermes.results
                + ['<tool_response>\\n' ~ message['content'] ~ '\\n</tool_response>'] %}
            {%- if loop.last or loop.nextitem['role'] != 'tool' or RESULT_ROLE == 'tool' %}
                {%- set hermes.turns = hermes.turns
                    + [{'role': RESULT_ROLE, 'content': hermes.results | join('\\n')}] %}
                {%- set hermes.results = [] %}
            {%- endif %}
        {%- elif message['tool_calls'] %}
            {%- set written = namespace(parts=[message['content']] if message['content'] else []) %}
            {%- for call in message['tool_calls'] %}
                {%- set written.parts = written.parts
                    + ['<tool_call>\\n{"name": ' ~ (call['function']['name'] | tojson) ~ ', "arguments": '
                       ~ (call['function']['arguments'] | tojson) ~ '}\\n</tool_call>'] %}
            {%- endfor %}
            {%- set hermes.turns = hermes.turns
                + [{'role': message['role'], 'content': written.parts | join('\\n')}] %}
        {%- else %}
            {%- set hermes.turns = hermes.turns + [message] %}
        {%- endif %}
    {%- endfor %}
    {%- set messages = hermes.turns %}
    {%- set tools = none %}
{%- endif %}
"""


def hermes_source(source: str, *, tool_role: bool) -> str:
    """Return a chat template that writes functions, calls and results in the Hermes format.

    Args:
        source: the template for conversations without functions.
        tool_role: whether the template has the role ``tool``; else the user's turn holds the results.
    """
    return _PRELUDE.replace("RESULT_ROLE", "'tool'" if tool_role else "'user'") + source
