"""A plugin of pytest that hides torchao: PEFT 0.18 imports names that torchao 0.18 has no more, and fails with it."""

import sys

sys.modules["torchao"] = None
