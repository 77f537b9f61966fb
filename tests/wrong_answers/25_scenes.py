# %% 1 · the colleague's workers each have their own
answer = (60, 60, 60, 120)
# %% 1 · a second pass adds nothing
answer = (60, 60, 30, 60)
# %% 1 · ours suffers too
answer = (30, 60, 30, 120)
# %% 1 · two workers make twice as many
answer = (120, 60, 120, 120)
# %% 1 · without workers it repeats
answer = (60, 30, 30, 60)
# %% 1 · one number
answer = 60
# %% 1 · three numbers
answer = (60, 60, 30)


# %% 2 · what is on the right
def left_of(scene):
    pairs = []
    for kind, right in itertools.pairwise(scene.kinds):
        if scene.kinds.count(kind) == 1:
            pairs.append((f"answer en what is left of the {NAMES[kind]}?", NAMES[right]))
    return pairs


# %% 2 · the first object wraps around to the last
def left_of(scene):
    pairs = []
    for i, kind in enumerate(scene.kinds):
        if scene.kinds.count(kind) == 1:
            pairs.append(
                (f"answer en what is left of the {NAMES[kind]}?", NAMES[scene.kinds[i - 1]])
            )
    return pairs


# %% 2 · of two cats nobody knows which
def left_of(scene):
    return [
        (f"answer en what is left of the {NAMES[kind]}?", NAMES[left])
        for left, kind in itertools.pairwise(scene.kinds)
    ]


# %% 2 · of two cats the first
def left_of(scene):
    pairs = {}
    for left, kind in itertools.pairwise(scene.kinds):
        pairs.setdefault(f"answer en what is left of the {NAMES[kind]}?", NAMES[left])
    return list(pairs.items())


# %% 2 · the leftmost object
def left_of(scene):
    return [
        (f"answer en what is left of the {NAMES[kind]}?", NAMES[scene.kinds[0]])
        for kind in scene.kinds[1:]
        if scene.kinds.count(kind) == 1
    ]


# %% 2 · with an article
def left_of(scene):
    return [
        (f"answer en what is left of the {NAMES[kind]}?", phrase(left, 1))
        for left, kind in itertools.pairwise(scene.kinds)
        if scene.kinds.count(kind) == 1
    ]


# %% 2 · numbers for names
def left_of(scene):
    return [
        (f"answer en what is left of the {kind}?", left)
        for left, kind in itertools.pairwise(scene.kinds)
        if scene.kinds.count(kind) == 1
    ]


# %% 2 · only the first question
def left_of(scene):
    for left, kind in itertools.pairwise(scene.kinds):
        if scene.kinds.count(kind) == 1:
            return [(f"answer en what is left of the {NAMES[kind]}?", NAMES[left])]
    return []


# %% 2 · only where the left one is single, too
def left_of(scene):
    return [
        (f"answer en what is left of the {NAMES[kind]}?", NAMES[left])
        for left, kind in itertools.pairwise(scene.kinds)
        if scene.kinds.count(kind) == 1 == scene.kinds.count(left)
    ]


# %% 2 · None where nothing can be asked
def left_of(scene):
    pairs = [
        (f"answer en what is left of the {NAMES[kind]}?", NAMES[left])
        for left, kind in itertools.pairwise(scene.kinds)
        if scene.kinds.count(kind) == 1
    ]
    return pairs or None


# %% 2 · the left edges, and not the centres
def left_of(scene):
    order = np.argsort(scene.boxes[:, 0], kind="stable")
    kinds = [scene.kinds[i] for i in order]
    return [
        (f"answer en what is left of the {NAMES[kind]}?", NAMES[left])
        for left, kind in itertools.pairwise(kinds)
        if kinds.count(kind) == 1
    ]


# %% 3 · adds one
def disguise(image):
    changed = image.copy()
    changed[0, 0, 0] += 1
    return changed


# %% 3 · subtracts one
def disguise(image):
    changed = image.copy()
    changed[0, 0, 0] -= 1
    return changed


# %% 3 · adds one, clipped
def disguise(image):
    changed = image.astype(int)
    changed[0, 0, 0] += 1
    return changed.clip(0, 255).astype(np.uint8)


# %% 3 · in place
def disguise(image):
    image[0, 0, 0] ^= 1
    return image


# %% 3 · a plain copy
def disguise(image):
    return image.copy()


# %% 3 · mirrored
def disguise(image):
    return image[:, ::-1].copy()


# %% 3 · other numbers
def disguise(image):
    return image.astype(np.float32) + 0.5


# %% 3 · cropped
def disguise(image):
    return image[1:, 1:].copy()


# %% 3 · noise
def disguise(image):
    noise = np.random.default_rng(0).integers(-1, 2, image.shape)
    return (image + noise).astype(np.uint8)


# %% 2 · the bare name for a prompt
def left_of(scene):
    return [
        (NAMES[kind], NAMES[left])
        for left, kind in itertools.pairwise(scene.kinds)
        if scene.kinds.count(kind) == 1
    ]


# %% 2 · no question mark
def left_of(scene):
    return [
        (f"answer en what is left of the {NAMES[kind]}", NAMES[left])
        for left, kind in itertools.pairwise(scene.kinds)
        if scene.kinds.count(kind) == 1
    ]


# %% 2 · answers without prompts
def left_of(scene):
    return [
        NAMES[left]
        for left, kind in itertools.pairwise(scene.kinds)
        if scene.kinds.count(kind) == 1
    ]


# %% 3 · a Pillow picture
def disguise(image):
    return Image.fromarray(image ^ 1)
