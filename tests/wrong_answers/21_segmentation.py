# %% 1 · forgets the separator
answers = [42, 4, 1]

# %% 1 · a separator behind the last, too
answers = [44, 4, 1]

# %% 1 · forgets the names
answers = [40, 4, 1]

# %% 1 · five fit without separators
answers = [43, 5, 1]

# %% 1 · the broken one counts
answers = [43, 4, 2]

# %% 1 · everything is lost
answers = [43, 4, 0]

# %% 1 · a guess
answers = [45, 4, 1]

# %% 1 · no number
answers = [43, None, 1]


# %% 2 · x before y
def read_mask(ids, width, height):
    locs = [token - FIRST_LOC for token in ids[:4]]
    segs = [token - FIRST_SEG for token in ids[4:20]]
    if (
        len(segs) < 16
        or not all(0 <= n < 1024 for n in locs)
        or not all(0 <= n < 128 for n in segs)
    ):
        return None
    x0, y0, x1, y1 = (n / 1023 for n in locs)
    box = x0 * width, y0 * height, x1 * width, y1 * height
    return paste_mask(codec.decode(torch.tensor([segs]))[0], box, width, height)


# %% 2 · checks nothing
def read_mask(ids, width, height):
    locs = [token - FIRST_LOC for token in ids[:4]]
    segs = [token - FIRST_SEG for token in ids[4:20]]
    return paste_mask(
        codec.decode(torch.tensor([segs]))[0], decode_box(locs, width, height), width, height
    )


# %% 2 · looks at the length only
def read_mask(ids, width, height):
    if len(ids) < 20:
        return None
    locs = [min(max(token - FIRST_LOC, 0), 1023) for token in ids[:4]]
    segs = [min(max(token - FIRST_SEG, 0), 127) for token in ids[4:20]]
    return paste_mask(
        codec.decode(torch.tensor([segs]))[0], decode_box(locs, width, height), width, height
    )


# %% 2 · collects the kinds wherever they stand
def read_mask(ids, width, height):
    locs = [i - FIRST_LOC for i in ids if 0 <= i - FIRST_LOC < 1024][:4]
    segs = [i - FIRST_SEG for i in ids if 0 <= i - FIRST_SEG < 128][:16]
    if len(locs) < 4 or len(segs) < 16:
        return None
    return paste_mask(
        codec.decode(torch.tensor([segs]))[0], decode_box(locs, width, height), width, height
    )


# %% 2 · asks for exactly twenty
def read_mask(ids, width, height):
    locs = [token - FIRST_LOC for token in ids[:4]]
    segs = [token - FIRST_SEG for token in ids[4:]]
    if (
        len(ids) != 20
        or not all(0 <= n < 1024 for n in locs)
        or not all(0 <= n < 128 for n in segs)
    ):
        return None
    return paste_mask(
        codec.decode(torch.tensor([segs]))[0], decode_box(locs, width, height), width, height
    )


# %% 2 · the square itself
def read_mask(ids, width, height):
    segs = [token - FIRST_SEG for token in ids[4:20]]
    if len(segs) < 16 or not all(0 <= n < 128 for n in segs):
        return None
    return codec.decode(torch.tensor([segs]))[0] > 0


# %% 2 · the whole box
def read_mask(ids, width, height):
    locs = [token - FIRST_LOC for token in ids[:4]]
    segs = [token - FIRST_SEG for token in ids[4:20]]
    if (
        len(segs) < 16
        or not all(0 <= n < 1024 for n in locs)
        or not all(0 <= n < 128 for n in segs)
    ):
        return None
    return paste_mask(torch.ones(64, 64), decode_box(locs, width, height), width, height)


# %% 2 · width and height turned round
def read_mask(ids, width, height):
    locs = [token - FIRST_LOC for token in ids[:4]]
    segs = [token - FIRST_SEG for token in ids[4:20]]
    if (
        len(segs) < 16
        or not all(0 <= n < 1024 for n in locs)
        or not all(0 <= n < 128 for n in segs)
    ):
        return None
    return paste_mask(
        codec.decode(torch.tensor([segs]))[0], decode_box(locs, height, width), height, width
    )


# %% 2 · forgets to subtract
def read_mask(ids, width, height):
    if len(ids) < 20:
        return None
    return paste_mask(
        codec.decode(torch.tensor([ids[4:20]]))[0],
        decode_box(ids[:4], width, height),
        width,
        height,
    )


# %% 2 · threshold at 0.5
def read_mask(ids, width, height):
    locs = [token - FIRST_LOC for token in ids[:4]]
    segs = [token - FIRST_SEG for token in ids[4:20]]
    if (
        len(segs) < 16
        or not all(0 <= n < 1024 for n in locs)
        or not all(0 <= n < 128 for n in segs)
    ):
        return None
    drawn = codec.decode(torch.tensor([segs]))[0] - 0.5
    return paste_mask(drawn, decode_box(locs, width, height), width, height)


# %% 3 · the last wins, whatever its score
def label_map(segments, width, height):
    labels = np.full((height, width), -1)
    for number, segment in enumerate(segments):
        labels[segment.mask] = number
    return labels


# %% 3 · the first wins, whatever its score
def label_map(segments, width, height):
    labels = np.full((height, width), -1)
    for number in reversed(range(len(segments))):
        labels[segments[number].mask] = number
    return labels


# %% 3 · from sure to unsure
def label_map(segments, width, height):
    labels = np.full((height, width), -1)
    for number in sorted(range(len(segments)), key=lambda n: -segments[n].score):
        labels[segments[number].mask] = number
    return labels


# %% 3 · of equal ones the last
def label_map(segments, width, height):
    labels = np.full((height, width), -1)
    for number in sorted(range(len(segments)), key=lambda n: segments[n].score):
        labels[segments[number].mask] = number
    return labels


# %% 3 · nobody is 0
def label_map(segments, width, height):
    labels = np.zeros((height, width), int)
    for number in sorted(range(len(segments)), key=lambda n: (segments[n].score, -n)):
        labels[segments[number].mask] = number
    return labels


# %% 3 · counts from 1
def label_map(segments, width, height):
    labels = np.full((height, width), -1)
    for number in sorted(range(len(segments)), key=lambda n: (segments[n].score, -n)):
        labels[segments[number].mask] = number + 1
    return labels


# %% 3 · numbers in the order of scores
def label_map(segments, width, height):
    labels = np.full((height, width), -1)
    for number, segment in enumerate(sorted(segments, key=lambda s: s.score)):
        labels[segment.mask] = number
    return labels


# %% 3 · width × height
def label_map(segments, width, height):
    labels = np.full((width, height), -1)
    for number in sorted(range(len(segments)), key=lambda n: (segments[n].score, -n)):
        labels.T[segments[number].mask] = number
    return labels


# %% 3 · argmax of scores: nobody is 0
def label_map(segments, width, height):
    if not segments:
        return np.full((height, width), -1)
    return np.stack([s.score * s.mask for s in segments]).argmax(0)
