# %% 1 · counts a location token letter by letter
answer = (18, 4, 4, 8)
# %% 1 · takes a number for one piece
answer = (2, 1, 4, 8)
# %% 1 · one token for each letter
answer = (2, 4, 2, 2)
# %% 1 · three bytes for an emoji
answer = (2, 4, 4, 6)
# %% 1 · takes equal neighbours together
answer = (1, 4, 4, 4)
# %% 1 · answers for one of four
answer = 2


# %% 2 · starts with letters
def train_bytes(text, merges):
    ids, pairs = [ord(letter) for letter in text], []
    while len(pairs) < merges and len(ids) > 1:
        counts = Counter(pairwise(ids))
        best = max(counts, key=counts.get)
        i = 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == best:
                ids[i : i + 2] = [256 + len(pairs)]
            i += 1
        pairs.append(best)
    return pairs


# %% 2 · counts once and takes the most common pairs
def train_bytes(text, merges):
    return [pair for pair, _ in Counter(pairwise(text.encode())).most_common(merges)]


# %% 2 · numbers new units from 257
def train_bytes(text, merges):
    ids, pairs = list(text.encode()), []
    while len(pairs) < merges and len(ids) > 1:
        counts = Counter(pairwise(ids))
        best = max(counts, key=counts.get)
        pairs.append(best)
        i = 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == best:
                ids[i : i + 2] = [256 + len(pairs)]
            i += 1
    return pairs


# %% 2 · on a tie the largest pair
def train_bytes(text, merges):
    ids, pairs = list(text.encode()), []
    while len(pairs) < merges and len(ids) > 1:
        counts = Counter(pairwise(ids))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        i = 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == best:
                ids[i : i + 2] = [256 + len(pairs)]
            i += 1
        pairs.append(best)
    return pairs


# %% 2 · merges from right to left
def train_bytes(text, merges):
    ids, pairs = list(text.encode()), []
    while len(pairs) < merges and len(ids) > 1:
        counts = Counter(pairwise(ids))
        best = max(counts, key=counts.get)
        i = len(ids) - 2
        while i >= 0:
            if tuple(ids[i : i + 2]) == best:
                ids[i : i + 2] = [256 + len(pairs)]
                i -= 1
            i -= 1
        pairs.append(best)
    return pairs


# %% 2 · does not stop when nothing is left
def train_bytes(text, merges):
    ids, pairs = list(text.encode()), []
    for new in range(256, 256 + merges):
        counts = Counter(pairwise(ids)) or Counter({(0, 0): 1})
        best = max(counts, key=counts.get)
        i = 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == best:
                ids[i : i + 2] = [new]
            i += 1
        pairs.append(best)
    return pairs


# %% 2 · returns strings
def train_bytes(text, merges):
    return train_bpe(text, merges)


# %% 2 · returns the ids instead of the pairs
def train_bytes(text, merges):
    return list(text.encode())


# %% 2 · one merge always
def train_bytes(text, merges):
    counts = Counter(pairwise(text.encode()))
    return [max(counts, key=counts.get)]


# %% 2 · splits the text into words first
def train_bytes(text, merges):
    words, pairs = [list(word.encode()) for word in text.split()], []
    while len(pairs) < merges and any(len(word) > 1 for word in words):
        counts = Counter(pair for word in words for pair in pairwise(word))
        best = max(counts, key=counts.get)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [256 + len(pairs)]
                i += 1
        pairs.append(best)
    return pairs


# %% 2 · keeps a table of the bytes instead of numbers for the merged pairs
def train_bytes(text, merges):
    parts, pairs = [bytes([byte]) for byte in text.encode()], []
    while len(pairs) < merges and len(parts) > 1:
        counts = Counter(pairwise(parts))
        best = max(counts, key=counts.get)
        pairs.append(best)
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == best:
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            i += 1
    return pairs


# %% 3 · two spaces in a row
broken = "two  cats"
# %% 3 · a control token
broken = "two cats<eos>"
# %% 3 · an emoji
broken = "🐱"
# %% 3 · a location that does not exist
broken = "<loc1024>"
# %% 3 · the name of a byte
broken = "<0x41>"
# %% 3 · a text that begins with a space
broken = " cat"
# %% 3 · bytes, no text
broken = b"\xff"
# %% 3 · a line break of another system
broken = "a\r\nb"
# %% 3 · the name of the unknown token
broken = "<unk>"
# %% 3 · nothing
broken = ""
