"""The one error that means: the input is wrong, and here is what to do."""


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, in which file or key, and the remedy.

    Commands print it and exit with `exit_code` (2 unless said otherwise); as a library it is an ordinary exception.
    Of several processes the first one speaks; `heard` is for what another may be the only witness of.
    """

    def __init__(self, message: str, exit_code: int = 2, heard: bool = False):
        super().__init__(" ".join(message.split()))
        self.exit_code, self.heard = exit_code, heard
