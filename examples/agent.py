"""An agent that chooses files of this folder, reads them, and says what they are for.

Start `adaskip-cpp serve model.gguf`, then run `python agent.py http://127.0.0.1:8000`. The time in the system prompt
changes each turn. The server moves the text after it instead of reading it again, if `tune` measured that this keeps
the promise, or if it was started with `--reuse edits`.
"""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from openai import OpenAI


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Usage: python agent.py URL")
    ask = OpenAI(base_url=f"{sys.argv[1].rstrip('/')}/v1", api_key="any").chat.completions.create
    files = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")}
    history = [{"role": "user", "content": f"Choose a file to read: {', '.join(files)}"}]
    for n_left in reversed(range(min(len(files), 3) + 1)):
        system = f"It is {datetime.now().isoformat(sep=' ')}. You explain what files are for."
        messages: Any = [{"role": "system", "content": system}, *history]
        schema = {"name": "file", "schema": {"enum": list(files)}}
        form: Any = {"type": "json_schema", "json_schema": schema} if n_left else {"type": "text"}
        answer: Any = ask(model="any", messages=messages, response_format=form, max_tokens=200)
        said = answer.choices[0].message.content
        names = ("prompt_tokens_reused", "prompt_tokens_moved", "reread_because")
        print(said, {name: answer.adaskip[name] for name in names}, sep="\n")
        history.append({"role": "assistant", "content": said})
        if n_left:
            request = "Choose another file to read." if n_left > 1 else "What are these files for?"
            history.append({"role": "user", "content": f"{files.pop(json.loads(said))}\n\n{request}"})


if __name__ == "__main__":
    main()
