# %% 1 · patches along one side only
image_tokens_at = {size: size // 14 for size in (224, 448, 896)}
# %% 1 · one token a pixel
image_tokens_at = {size: size**2 for size in (224, 448, 896)}
# %% 1 · twice the side gives twice the tokens
image_tokens_at = {224: 256, 448: 512, 896: 1024}
# %% 1 · the same for all
image_tokens_at = {224: 256, 448: 256, 896: 256}
# %% 1 · patches of 16, as in ViT
image_tokens_at = {size: (size // 16) ** 2 for size in (224, 448, 896)}
# %% 1 · one for a class token
image_tokens_at = {size: (size // 14) ** 2 + 1 for size in (224, 448, 896)}
# %% 1 · a list
image_tokens_at = [256, 1024, 4096]


# %% 2 · one bee
def two_bees():
    picture = Image.new("RGB", (112, 112), (235, 240, 225))
    bee = sprite("bee").resize((40, 40))
    picture.paste(bee, (36, 36), bee)
    return picture


# %% 2 · both at the same place
def two_bees():
    picture = Image.new("RGB", (112, 112), (235, 240, 225))
    bee = sprite("bee").resize((40, 40))
    for _ in range(2):
        picture.paste(bee, (36, 36), bee)
    return picture


# %% 2 · three bees
def two_bees():
    picture = Image.new("RGB", (112, 112), (235, 240, 225))
    bee = sprite("bee").resize((32, 32))
    for x in (4, 40, 76):
        picture.paste(bee, (x, 36), bee)
    return picture


# %% 2 · another insect
def two_bees():
    picture = Image.new("RGB", (112, 112), (235, 240, 225))
    other = sprite("tulip").resize((40, 40))
    for x in (8, 62):
        picture.paste(other, (x, 36), other)
    return picture


# %% 2 · a bee and something else
def two_bees():
    picture = Image.new("RGB", (112, 112), (235, 240, 225))
    for x, name in ((8, "bee"), (62, "dog")):
        small = sprite(name).resize((40, 40))
        picture.paste(small, (x, 36), small)
    return picture


# %% 2 · a larger canvas
def two_bees():
    picture = Image.new("RGB", (224, 224), (235, 240, 225))
    bee = sprite("bee")
    for x in (20, 130):
        picture.paste(bee, (x, 80), bee)
    return picture


# %% 2 · pastes into a copy and returns the empty picture
def two_bees():
    picture = Image.new("RGB", (112, 112), (235, 240, 225))
    bee = sprite("bee").resize((40, 40))
    for x in (8, 62):
        picture.copy().paste(bee, (x, 36), bee)
    return picture


# %% 3 · adds
def likelihood(sure):
    return float(sum(sure))


# %% 3 · the mean
def likelihood(sure):
    return sum(sure) / len(sure)


# %% 3 · the least likely token alone
def likelihood(sure):
    return float(min(sure))


# %% 3 · forgets the end
def likelihood(sure):
    product = 1.0
    for p in sure[:-1]:
        product *= p
    return product


# %% 3 · the geometric mean
def likelihood(sure):
    return float(torch.tensor(sure, dtype=torch.float64).prod() ** (1 / len(sure)))


# %% 3 · the logarithm
def likelihood(sure):
    return float(torch.tensor(sure, dtype=torch.float64).log().sum())


# %% 3 · the last token's
def likelihood(sure):
    return float(sure[-1])


# %% 3 · a tensor
def likelihood(sure):
    return torch.tensor(sure).prod()
