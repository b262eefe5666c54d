"""Texts in which tokenizers go wrong: spaces, line ends, signs that stand for spaces or tokens, bytes of no piece."""

HARD_TEXTS = [
    "plain words",
    " leading and trailing ",
    "   runs    of   spaces   ",
    "def f(x):\n    return x  # hi there",
    "if x:\n    return\tx\n\n        y = 12345\n",
    "\n\n\n",
    "\t\t \t",
    " \n  \n",
    "line ends\r\nof others\r",
    "naïve café, 東京, עברית, 🏳️\u200d🌈🙂 e\u0301",
    "\u00a0\u2003\u2028\ufeff\x07",
    "a ▁ lower block ▁▁",
    "</s> <s> <unk> <0x0A> are text",
    "3.14159 + 2_718_281 == 0xFF",
]
