"""What the command line says of a mistake."""


def fails(outcome: tuple[int, str, str], *words: str) -> None:
    """One line of ours on stderr, with these words, and exit code 1."""
    code, out, err = outcome
    assert code == 1
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("vitreg: ")
    assert all(word in lines[0] for word in words), lines[0]
