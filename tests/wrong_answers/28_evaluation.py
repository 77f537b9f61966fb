# %% 1 · believes that any gap is a gap
answer_1 = (False, False, 4000)
# %% 1 · believes that overlap stays
answer_1 = (True, True, 4000)
# %% 1 · twice the scenes
answer_1 = (True, False, 2000)
# %% 1 · half the scenes
answer_1 = (True, False, 500)
# %% 1 · four times as many more
answer_1 = (True, False, 5000)
# %% 1 · two answers only
answer_1 = (True, False)
# %% 1 · words
answer_1 = ("yes", "no", 4000)
# %% 1 · the root's other side
answer_1 = (True, False, 1414)


# %% 2 · the next question's picture
def shuffled_score(pipeline, images, prompts, truths):
    said = predict(pipeline, images[1:] + images[:1], prompts)
    return exact_match(said, truths)


# %% 2 · back to front
def shuffled_score(pipeline, images, prompts, truths):
    return exact_match(predict(pipeline, images[::-1], prompts), truths)


# %% 2 · by lot
def shuffled_score(pipeline, images, prompts, truths):
    order = np.random.default_rng(0).permutation(len(images))
    return exact_match(predict(pipeline, [images[i] for i in order], prompts), truths)


# %% 2 · moves the truths along with the pictures
def shuffled_score(pipeline, images, prompts, truths):
    pictures = list({id(image): image for image in images}.values())
    following = {id(a): b for a, b in zip(pictures, pictures[1:] + pictures[:1])}
    said = predict(pipeline, [following[id(image)] for image in images], prompts)
    return exact_match(said, truths[1:] + truths[:1])


# %% 2 · the pictures as they are
def shuffled_score(pipeline, images, prompts, truths):
    return exact_match(predict(pipeline, images, prompts), truths)


# %% 2 · one question a picture
def shuffled_score(pipeline, images, prompts, truths):
    first = {id(image): n for n, image in reversed(list(enumerate(images)))}
    chosen = sorted(first.values())
    shown = [images[n] for n in chosen[1:] + chosen[:1]]
    said = predict(pipeline, shown, [prompts[n] for n in chosen])
    return exact_match(said, [truths[n] for n in chosen])


# %% 2 · shuffles in place
def shuffled_score(pipeline, images, prompts, truths):
    images.append(images.pop(0))
    return exact_match(predict(pipeline, images, prompts), truths)


# %% 2 · a grey picture for all
def shuffled_score(pipeline, images, prompts, truths):
    grey = Image.new("L", (4, 4), 128)
    return exact_match(predict(pipeline, [grey] * len(images), prompts), truths)


# %% 2 · a share, not a percentage
def shuffled_score(pipeline, images, prompts, truths):
    pictures = list({id(image): image for image in images}.values())
    following = {id(a): b for a, b in zip(pictures, pictures[1:] + pictures[:1])}
    said = predict(pipeline, [following[id(image)] for image in images], prompts)
    return exact_match(said, truths) / 100


# %% 2 · returns the answers
def shuffled_score(pipeline, images, prompts, truths):
    pictures = list({id(image): image for image in images}.values())
    following = {id(a): b for a, b in zip(pictures, pictures[1:] + pictures[:1])}
    return predict(pipeline, [following[id(image)] for image in images], prompts)


# %% 3 · equal bytes
def leaked(train, test):
    known = {picture.tobytes() for picture in train}
    return [i for i, picture in enumerate(test) if picture.tobytes() in known]


# %% 3 · equal bytes at an equal size
def leaked(train, test):
    known = {picture.resize((112, 112)).tobytes() for picture in train}
    return [i for i, p in enumerate(test) if p.resize((112, 112)).tobytes() in known]


# %% 3 · every picture of another size
def leaked(train, test):
    return [i for i, picture in enumerate(test) if picture.size != train[0].size]


# %% 3 · small pictures, but light counts
def leaked(train, test):
    small = [np.asarray(p.convert("L").resize((16, 16)), float) for p in train]
    found = []
    for i, p in enumerate(test):
        mine = np.asarray(p.convert("L").resize((16, 16)), float)
        if min(abs(mine - other).mean() for other in small) < 4:
            found.append(i)
    return found


# %% 3 · equal mean colour
def leaked(train, test):
    means = [np.asarray(p).mean((0, 1)) for p in train]
    return [
        i
        for i, p in enumerate(test)
        if min(abs(np.asarray(p).mean((0, 1)) - m).max() for m in means) < 8
    ]


# %% 3 · a threshold that accuses too many
def leaked(train, test):
    def fingerprint(picture):
        small = np.asarray(picture.convert("L").resize((16, 16)), float)
        return (small - small.mean()).ravel() / np.linalg.norm(small - small.mean())

    a, b = (np.array([fingerprint(p) for p in pictures]) for pictures in (test, train))
    return np.flatnonzero((a @ b.T).max(1) > 0.5).tolist()


# %% 3 · forgets to subtract the mean
def leaked(train, test):
    def fingerprint(picture):
        small = np.asarray(picture.convert("L").resize((16, 16)), float)
        return small.ravel() / np.linalg.norm(small)

    a, b = (np.array([fingerprint(p) for p in pictures]) for pictures in (test, train))
    return np.flatnonzero((a @ b.T).max(1) > 0.95).tolist()


# %% 3 · indices of the training pictures
def leaked(train, test):
    def fingerprint(picture):
        small = np.asarray(picture.convert("L").resize((16, 16)), float)
        return (small - small.mean()).ravel() / np.linalg.norm(small - small.mean())

    a, b = (np.array([fingerprint(p) for p in pictures]) for pictures in (test, train))
    return np.flatnonzero((a @ b.T).max(0) > 0.95).tolist()


# %% 3 · compares the test with itself
def leaked(train, test):
    sizes = [picture.tobytes() for picture in test]
    return [i for i, s in enumerate(sizes) if s in sizes]


# %% 3 · an array of truth values
def leaked(train, test):
    return np.zeros(len(test), bool)


# %% 1 · only two of three
answer_1 = (True, False, None)
# %% 1 · the number as a word
answer_1 = (True, False, "4000")


# %% 2 · half of the list further on
def shuffled_score(pipeline, images, prompts, truths):
    half = len(images) // 2
    return exact_match(predict(pipeline, images[half:] + images[:half], prompts), truths)


# %% 2 · leaves out the questions that would see their own
def shuffled_score(pipeline, images, prompts, truths):
    moved = images[1:] + images[:1]
    kept = [i for i in range(len(images)) if moved[i] is not images[i]]
    said = predict(pipeline, [moved[i] for i in kept], [prompts[i] for i in kept])
    return exact_match(said, [truths[i] for i in kept])


# %% 2 · always the first picture
def shuffled_score(pipeline, images, prompts, truths):
    return exact_match(predict(pipeline, [images[0]] * len(images), prompts), truths)
