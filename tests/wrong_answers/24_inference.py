# %% 1 · each picture its own pass
passes = [1, 0, 3, 0, 1, 2]
# %% 1 · what was encoded is looked at again
passes = [1, 1, 1, 1, 1, 2]
# %% 1 · remembers a picture by itself
passes = [1, 0, 1, 0, 1, 1]
# %% 1 · a batch of one encoded and one new: two
passes = [1, 0, 1, 0, 2, 2]
# %% 1 · a batch of two encoded looks twice
passes = [1, 0, 1, 2, 1, 2]
# %% 1 · thinks each token looks again
passes = [6, 0, 6, 0, 6, 12]
# %% 1 · one number for all
passes = 5
# %% 1 · five numbers
passes = [1, 0, 1, 0, 1]


# %% 2 · returns nothing
def run(arguments, pg):
    print(pg(arguments[0], arguments[1]))


# %% 2 · no conventions at all
def run(arguments, pg):
    print(pg(*arguments))
    return 0


# %% 2 · the error goes to standard output
def run(arguments, pg):
    if len(arguments) != 2:
        print("error: give a picture and a prompt")
        return 2
    try:
        print(pg(*arguments))
    except ValueError as error:
        print("error:", error)
        return 2
    return 0


# %% 2 · catches everything
def run(arguments, pg):
    try:
        print(pg(*arguments))
    except Exception as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


# %% 2 · says that something went wrong
def run(arguments, pg):
    if len(arguments) != 2:
        print("error: something went wrong", file=sys.stderr)
        return 2
    try:
        print(pg(*arguments))
    except ValueError:
        print("error: something went wrong", file=sys.stderr)
        return 2
    return 0


# %% 2 · 1 for a mistake
def run(arguments, pg):
    if len(arguments) != 2:
        print("error: give a picture and a prompt", file=sys.stderr)
        return 1
    try:
        print(pg(*arguments))
    except ValueError as error:
        print("error:", error, file=sys.stderr)
        return 1
    return 0


# %% 2 · leaves Python
def run(arguments, pg):
    if len(arguments) != 2:
        sys.exit("error: give a picture and a prompt")
    try:
        print(pg(*arguments))
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(0)


# %% 2 · prints the whole traceback
def run(arguments, pg):
    import traceback

    if len(arguments) != 2:
        print("error: give a picture and a prompt", file=sys.stderr)
        return 2
    try:
        print(pg(*arguments))
    except ValueError:
        traceback.print_exc()
        return 2
    return 0


# %% 2 · does not look at the number of arguments
def run(arguments, pg):
    try:
        print(pg(arguments[0], arguments[1]))
    except ValueError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


# %% 2 · more on standard output than the answer
def run(arguments, pg):
    if len(arguments) != 2:
        print("error: give a picture and a prompt", file=sys.stderr)
        return 2
    try:
        print("answer:", pg(*arguments))
    except ValueError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


# %% 2 · returns True
def run(arguments, pg):
    if len(arguments) != 2:
        print("error: give a picture and a prompt", file=sys.stderr)
        return False
    try:
        print(pg(*arguments))
    except ValueError as error:
        print("error:", error, file=sys.stderr)
        return False
    return True


# %% 3 · passes everything on
def until(pieces, stop):
    yield from pieces


# %% 3 · looks at each piece alone
def until(pieces, stop):
    for piece in pieces:
        if stop in piece:
            yield piece[: piece.index(stop)]
            return
        yield piece


# %% 3 · waits for the whole text
def until(pieces, stop):
    yield "".join(pieces).split(stop)[0]


# %% 3 · holds everything back until the stop word comes
def until(pieces, stop):
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            break
    yield held.split(stop)[0]


# %% 3 · forgets what it held
def until(pieces, stop):
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held[: held.index(stop)]
            return
        safe = len(held) - len(stop) + 1
        if safe > 0:
            yield held[:safe]
            held = held[safe:]


# %% 3 · yields the stop word too
def until(pieces, stop):
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held[: held.index(stop) + len(stop)]
            return
        safe = len(held) - len(stop) + 1
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    yield held


# %% 3 · goes on asking after the stop word
def until(pieces, stop):
    held, done = "", False
    for piece in pieces:
        if done:
            continue
        held += piece
        if stop in held:
            yield held[: held.index(stop)]
            held, done = "", True
        safe = len(held) - len(stop) + 1
        if not done and safe > 0:
            yield held[:safe]
            held = held[safe:]
    yield held


# %% 3 · holds one character too few back
def until(pieces, stop):
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held[: held.index(stop)]
            return
        safe = len(held) - len(stop) + 2
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    yield held


# %% 3 · returns a list
def until(pieces, stop):
    return ["".join(pieces).split(stop)[0]]
