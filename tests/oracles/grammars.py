"""Grammars that would take all time or memory."""


def rules(n: int, template: str) -> str:
    """``n`` rules of which each goes on with the next; the last is the letter a."""
    made = [f"r{rank} ::= " + template.replace("NEXT", f"r{rank + 1}") for rank in range(n)]
    return "\n".join(["root ::= r0", *made, f'r{n} ::= "a"'])


CHAIN, FORK, BOTH = rules(90_000, "NEXT"), rules(60, "NEXT | NEXT"), rules(60, 'NEXT "a" | NEXT "b"')
WAYS = "root ::= " + " | ".join(f'[a-z ] root "{letter}"' for letter in "abcdefghijklmnop") + ' | "x"'
