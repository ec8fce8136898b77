"""Train the tokenizer of `src/gaie_codec/_builtin_tokenizer/`: word lists in this file -> the five files of a model directory.

    python tools/train_tokenizer.py            write the files
    python tools/train_tokenizer.py --check    fail if they are not what it would write

A byte-level BPE with all 256 bytes, for tests, examples and the simulator, where no model's tokenizer is at hand. The corpus is
made here, from words in falling frequency, so that the result needs no download and has no other author. Same tokenizers version,
same bytes out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

DIRECTORY: Final = Path(__file__).parent.parent / "src" / "gaie_codec" / "_builtin_tokenizer"
VOCAB_SIZE: Final = 3072
MAX_MODEL_LEN: Final = 8192
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Letters with the space before them, up to three digits, marks, spaces: contractions stay whole, and line ends join.
SPLIT: Final = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# The most frequent first.
ENGLISH: Final = """
the of and to a in is it you that he was for on are with as I his they be at one have this from or had by not but what some we can
out other were all there when up use your how said an each she which do their time if will way about many then them would write
like so these her long make thing see him two has look more day could go come did number sound no most people my over know water
than call first who may down side been now find any new work part take get place made live where after back little only round man
year came show every good me give our under name very through just form sentence great think say help low line differ turn cause
much mean before move right boy old too same tell does set three want air well also play small end put home read hand port large
spell add even land here must big high such follow act why ask men change went light kind off need house picture try us again
animal point mother world near build self earth father head stand own page should country found answer school grow study still
learn plant cover food sun four between state keep eye never last let thought city tree cross farm hard start might story saw far
sea draw left late run while press close night real life few north open seem together next white children begin got walk example
ease paper group always music those both mark often letter until mile river car feet care second book carry took science eat room
friend began idea fish mountain stop once base hear horse cut sure watch color face wood main enough plain girl usual young ready
above ever red list though feel talk bird soon body dog family direct pose leave song measure door product black short numeral
class wind question happen complete ship area half rock order fire south problem piece told knew pass since top whole king space
heard best hour better true during hundred five remember step early hold west ground interest reach fast verb sing listen six
table travel less morning ten simple several vowel toward war lay against pattern slow center love person money serve appear road
map rain rule govern pull cold notice voice unit power town fine certain fly fall lead cry dark machine note wait plan figure star
box noun field rest correct able pound done beauty drive stood contain front teach week final gave green quick develop ocean warm
free minute strong special mind behind clear tail produce fact street inch multiply nothing course stay wheel full force blue
object decide surface deep moon island foot system busy test record boat common gold possible plane dry wonder laugh thousand ago
ran check game shape equate hot miss brought heat snow tire bring yes distant fill east paint language among grand ball yet wave
drop heart present heavy dance engine position arm wide sail material size vary settle speak weight general ice matter circle pair
include divide felt perhaps pick sudden count square reason length represent art subject region energy hunt probable bed brother
egg ride cell believe fraction forest sit race window store summer train sleep prove lone leg exercise wall catch mount wish sky
board joy winter written wild instrument kept glass grass cow job edge sign visit past soft fun bright gas weather month million
bear finish happy hope flower clothe strange gone jump baby eight village meet root buy raise solve metal whether push seven
paragraph third shall held hair describe cook floor either result burn hill safe cat century consider type law bit coast copy
phrase silent tall sand soil roll temperature finger industry value fight lie beat excite natural view sense ear else quite broke
case middle kill son lake moment scale loud spring observe child straight consonant nation dictionary milk speed method organ pay
age section dress cloud surprise quiet stone tiny climb cool design poor lot experiment bottom key iron single stick flat twenty
skin smile crease hole trade melody trip office receive row mouth exact symbol die least trouble shout except wrote seed tone join
suggest clean break lady yard rise bad blow oil blood touch grew cent mix team wire cost lost brown wear garden equal sent choose
fell fit flow fair bank collect save control decimal gentle woman captain practice separate difficult doctor please protect noon
"""
TECHNICAL: Final = """
model server token request response stream gateway prompt message chunk error client status header body schema field adapter
weather tool function call arguments parameters city temperature unit location query result assistant system user content role
inference cluster endpoint schedule latency throughput cache prefix batch queue memory worker replica pod service deployment
protocol buffer frame payload encode decode transcode snapshot version release license document configuration environment variable
import return class self None True False string number boolean object array null type name description properties required public
private static const await async yield lambda except finally raise assert while break continue default struct interface package
length index value key items values append format print range open close read write test expected actual input output example
"""
OTHER_LANGUAGES: Final = """
der die das und ist nicht ein eine mit auf für von wir ich sie es über können größer Straße heute Wetter Antwort
le la les une des est dans pour que qui avec sur être très bonjour aujourd réponse où français façon
el los las una por con para como está más qué mañana respuesta señor niño también gracias
il che non per sono della questo perché città è più grazie
o os um uma não é com você está ação também obrigado
и в не на что он как это привет мир ответ вопрос слово время
这 是 的 一 不 了 我 你 在 有 人 们 中 国 大 天 气 今 好 世 界 回 答 问 题 语 言 模 型
の に は を た が で て と し こんにちは 世界 今日 天気 です ます ありがとう カタカナ テスト
안녕하세요 세계 오늘 날씨 입니다 감사합니다 질문 대답
مرحبا العالم اليوم الطقس في من على שלום עולם नमस्ते दुनिया สวัสดี γειά σου κόσμε
😀 😂 👍 ❤️ 🎉 🚀 🙏 ✅ – — … “ ” ‘ ’ € £ ° × ½ → •
"""  # noqa: RUF001  # other alphabets have letters that look like ours
CODE: Final = (
    'def {0}(self, {1}: str) -> dict[str, int]:\n    """Return the {0} of {1}."""\n    return self.{1}["{0}"]\n\n\n',
    'for {0} in range(len({1})):\n        if {0} != {1}[{0}]:\n            raise ValueError(f"{0}: {{{1}}}")\n',
    "import {0}\nfrom {1} import {0}\n\n# {0} and {1}\n",
    'async function {0}({1}) {{\n  const {0} = await fetch("https://example.com/{1}");\n  return {0}.json();\n}}\n',
    "if ({0} == null) {{ {1}++; }} else {{ {0} += 1; }} // {1}\n",
    '{{"{0}": "{1}", "type": "object", "properties": {{"{1}": {{"type": "string"}}}}, "required": ["{0}"]}}\n',
    '<tool_call>\n{{"name": "{0}", "arguments": {{"{1}": true}}}}\n</tool_call>\n',
    "SELECT {0}, COUNT(*) FROM {1} WHERE {0} = 'x' GROUP BY {0};\n",
    '<{0} class="{1}">{1}</{0}>\n',
    "- **{0}**: {1}\n- `{1}`\n\n## {0}\n\n1. {0}\n2. {1}\n\n",
)
SENTENCES: Final = (
    "The {0} is a {1}, and it's not the {2}.\n",
    "You can {0} every {1} with this {2}. I don't know; they'll say so.\n\n",
    "What is the {0} of {1}? We've seen that the {2}'s {1} wasn't there!\n",
    '"{0}," she said, "is what I call {1} ({2})."\n',
)
# Runs that text has and words do not.
OTHER: Final = (
    "\n\n \n        ...  ,,  ==  !=  ->  =>  ()  []  {}  ://  </  />  --  ---  ===  ***  ```\n```python\n  0 1 2 10 12 100 2024 2026 3.14\n"
)

CHAT_TEMPLATE: Final = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}
{%- endif %}
{{- 'These functions may be called, one JSON schema on each line:\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>\\nTo call one, answer with its name and arguments:\\n<tool_call>\\n' }}
{{- '{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}
{{- '\\n' }}
{%- endif %}
{{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def corpus() -> Iterator[str]:
    """Lines of text, each word about as often as its rank says."""
    english, technical = ENGLISH.split(), TECHNICAL.split()
    for words, weight in ((english, 4000), (technical, 1500), (OTHER_LANGUAGES.split(), 600)):
        for rank, word in enumerate(words):
            yield f" {word}" * (weight // (rank + 20) + 2)
        for word in words[:400]:
            yield f"{word.capitalize()} {word}\n" * 2
    for ending in ("s", "ed", "ing", "er", "ly", "tion", "able", "ness", "ment", "est"):
        for word in english[100:500:7]:
            yield f" {word}{ending}"
    names = cycle(technical)
    for template in CODE * 40:
        yield template.format(*islice(names, 2))
    fillers = cycle(english[40:])
    for template in SENTENCES * 60:
        yield template.format(*islice(fillers, 3))
    yield from [OTHER] * 50


def train() -> Tokenizer:
    """The tokenizer, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def files() -> dict[str, str]:
    """The directory's files by name."""
    tokenizer = train()
    end_of_text, _, end_of_message = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    return {
        "tokenizer.json": tokenizer.to_str() + "\n",
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": None,
                "eos_token": SPECIAL_TOKENS[2],
                "pad_token": SPECIAL_TOKENS[0],
                "model_max_length": MAX_MODEL_LEN,
                "clean_up_tokenization_spaces": False,
            }
        ),
        "generation_config.json": _json({"eos_token_id": [end_of_message, end_of_text]}),
        "config.json": _json(
            {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": MAX_MODEL_LEN, "eos_token_id": end_of_message}
        ),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def main() -> int:
    """Write or check the files; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is not current")
    check = parser.parse_args().check
    stale = 0
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in files().items():
        path = DIRECTORY / name
        if check and (not path.exists() or path.read_bytes() != text.encode()):
            print(f"{path} is not current: run python {sys.argv[0]}")
            stale = 1
        elif not check:
            path.write_bytes(text.encode())
    return stale


if __name__ == "__main__":
    sys.exit(main())
