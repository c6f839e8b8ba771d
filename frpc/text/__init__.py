"""Explained texts: relevance of tokens and words, in colour on a terminal, in HTML and as bars.

found = frpc.text.explain(model, tokenizer, "a dull plot, played brilliantly")
print(found.words, found.total, found.output)     # the words' relevance sums to the output
"""

from frpc.text.ask import explain
from frpc.text.questions import Question
from frpc.text.record import TextExplanation, of, page
from frpc.text.sheet import Word
from frpc.text.tokens import Reading, encode, listed

__all__ = ["Question", "Reading", "TextExplanation", "Word", "encode", "explain", "listed", "of", "page"]
