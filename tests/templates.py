"""Chat templates that behave as those of well-known models do, written anew and no longer than that takes."""

from tests.tiny import byte_level_tokenizer

# Qwen2.5: ChatML; a system prompt of its own where there is none.
QWEN25 = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Plain ChatML, which keeps every content as it is.
CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen3: reasoning is taken out of the content; written back, spaced anew, behind the last question, where an answer
# without any gets an empty block; dropped in front of it.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- set body = m.content %}
  {%- if m.role == 'assistant' %}
    {%- set thought = '' %}
    {%- if '</think>' in body %}
      {%- set thought = body.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
      {%- set body = body.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last and (loop.last or thought) %}
      {%- set body = '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' ~ body.lstrip('\\n') %}
    {%- endif %}
  {%- endif %}
  {{- '<|im_start|>' ~ m.role ~ '\\n' ~ body ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Llama-3.1: bos in the template, a system header with dates in any case, contents trimmed. (Llama-3.2 asks for today's
# date with strftime_now.)
LLAMA31 = """\
{{- bos_token }}
{%- set today = strftime_now('%d %b %Y') if strftime_now is defined and ask_the_clock is defined else '26 Jul 2024' %}
{%- set instruction = '' %}{% set rest = messages %}
{%- if messages[0].role == 'system' %}{% set instruction = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' ~ today ~ '\\n\\n' ~ instruction ~ '<|eot_id|>' }}
{%- for m in rest %}
  {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA32 = "{% set ask_the_clock = true %}" + LLAMA31

# Gemma-2: no system role, strictly user and model in turn, contents trimmed.
GEMMA2 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
  {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' ~ m.content | trim }}
  {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# Mistral-7B: the system text goes into the first user message; an answer stands between a blank and eos, and nothing
# but the closing bracket prompts for it.
MISTRAL = """\
{{- bos_token }}
{%- set instruction = '' %}{% set rest = messages %}
{%- if messages[0].role == 'system' %}
  {%- set instruction = messages[0].content ~ '\\n\\n' %}{% set rest = messages[1:] %}
{%- endif %}
{%- for m in rest %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
  {%- if m.role == 'user' %}{{ ' [INST] ' ~ (instruction if loop.first else '') ~ m.content ~ ' [/INST]' }}
  {%- else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}
{%- endfor %}"""

# Mistral-7B-v0.3: the system text goes into the user's message only while that is the last message of all.
MISTRAL_V3 = """\
{{- bos_token }}
{%- set instruction = '' %}{% set rest = messages %}
{%- if messages[0].role == 'system' %}
  {%- set instruction = messages[0].content ~ '\\n\\n' %}{% set rest = messages[1:] %}
{%- endif %}
{%- for m in rest %}
  {%- if m.role == 'user' %}{{ '[INST] ' ~ (instruction if loop.last else '') ~ m.content ~ '[/INST]' }}
  {%- else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}
{%- endfor %}"""

# Phi-3: eos behind everything unless the model is to go on.
PHI3 = """\
{%- for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI4 = """\
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '<|im_sep|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# DeepSeek-R1 distills: everything up to </think> is dropped, and the generation prompt opens a think block.
DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ '<｜User｜>' ~ m.content }}
  {%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' ~ m.content.split('</think>')[-1] ~ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

# gpt-oss: the last answer ends in another token than those before it.
HARMONY = """\
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {{- '<|start|>assistant<|channel|>final<|message|>' ~ m.content ~ ('<|return|>' if loop.last else '<|end|>') }}
  {%- else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def qwen25():
    return byte_level_tokenizer(QWEN25)


def chatml(**options):
    return byte_level_tokenizer(CHATML, **options)


def qwen3():
    return byte_level_tokenizer(QWEN3)


def llama31(template=LLAMA31):
    return byte_level_tokenizer(
        template, special=LLAMA3_TOKENS, bos="<|begin_of_text|>", eos="<|eot_id|>", add_bos=True
    )


def gemma2():
    return byte_level_tokenizer(
        GEMMA2, special=("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", add_bos=True
    )


def mistral(template=MISTRAL):
    return byte_level_tokenizer(template, special=("[INST]", "[/INST]"), bos="<s>", eos="</s>", add_bos=True)


def phi3():
    return byte_level_tokenizer(
        PHI3, special=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), eos="<|end_of_text|>"
    )


def phi4():
    return byte_level_tokenizer(PHI4, special=("<|im_start|>", "<|im_sep|>", "<|im_end|>"))


def deepseek_r1():
    return byte_level_tokenizer(
        DEEPSEEK_R1,
        special=("<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        add_bos=True,
    )


def harmony():
    special = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
    return byte_level_tokenizer(HARMONY, special=special, eos="<|return|>")
