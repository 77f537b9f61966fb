# %% 1 · x before y
def read_points(text, width, height):
    found = re.findall(r"(?<!>)((?:<loc\d{4}>){2})(?!<loc)([^;<>\n]*)", text)
    out = []
    for run, label in found:
        x, y = (int(n) for n in re.findall(r"\d{4}", run))
        out.append((label.strip(), (x / 1023 * width, y / 1023 * height)))
    return out


# %% 1 · splits at the semicolons
def read_points(text, width, height):
    points = []
    for part in text.split(" ; "):
        y, x = int(part[4:8]), int(part[13:17])
        points.append((part[18:].strip(), (x / 1023 * width, y / 1023 * height)))
    return points


# %% 1 · divides by 1024
def read_points(text, width, height):
    points = []
    for run, label in re.findall(r"((?:<loc\d{4}>)+)([^;<>\n]*)", text):
        numbers = [int(number) for number in re.findall(r"\d{4}", run)]
        if len(numbers) == 2 and max(numbers) <= 1023:
            points.append((label.strip(), (numbers[1] / 1024 * width, numbers[0] / 1024 * height)))
    return points


# %% 1 · takes two numbers of any longer run
def read_points(text, width, height):
    points = []
    for y, x, label in re.findall(r"<loc(\d{4})><loc(\d{4})>([^;<>\n]*)", text):
        points.append((label.strip(), (int(x) / 1023 * width, int(y) / 1023 * height)))
    return points


# %% 1 · the last two of a longer run, as the lesson does with four
def read_points(text, width, height):
    points = []
    for match in OBJECT.finditer(text):
        numbers = [int(number) for number in re.findall(r"\d{4}", match[1])][-2:]
        if len(numbers) == 2 and max(numbers) <= 1023:
            y, x = numbers
            points.append((match[3].strip(), (x / 1023 * width, y / 1023 * height)))
    return points


# %% 1 · does not look at the size of the numbers
def read_points(text, width, height):
    points = []
    for run, label in re.findall(r"((?:<loc\d{4}>)+)([^;<>\n]*)", text):
        numbers = [int(number) for number in re.findall(r"\d{4}", run)]
        if len(numbers) == 2:
            points.append((label.strip(), (numbers[1] / 1023 * width, numbers[0] / 1023 * height)))
    return points


# %% 1 · unpacks every run
def read_points(text, width, height):
    points = []
    for run, label in re.findall(r"((?:<loc\d{4}>)+)([^;<>\n]*)", text):
        y, x = (int(number) for number in re.findall(r"\d{4}", run))
        points.append((label.strip(), (x / 1023 * width, y / 1023 * height)))
    return points


# %% 1 · swaps width and height
def read_points(text, width, height):
    points = []
    for run, label in re.findall(r"((?:<loc\d{4}>)+)([^;<>\n]*)", text):
        numbers = [int(number) for number in re.findall(r"\d{4}", run)]
        if len(numbers) == 2 and max(numbers) <= 1023:
            points.append((label.strip(), (numbers[1] / 1023 * height, numbers[0] / 1023 * width)))
    return points


# %% 1 · leaves the space before the label
def read_points(text, width, height):
    points = []
    for run, label in re.findall(r"((?:<loc\d{4}>)+)([^;<>\n]*)", text):
        numbers = [int(number) for number in re.findall(r"\d{4}", run)]
        if len(numbers) == 2 and max(numbers) <= 1023:
            points.append((label, (numbers[1] / 1023 * width, numbers[0] / 1023 * height)))
    return points


# %% 1 · returns a generator
def read_points(text, width, height):
    for run, label in re.findall(r"((?:<loc\d{4}>)+)([^;<>\n]*)", text):
        numbers = [int(number) for number in re.findall(r"\d{4}", run)]
        if len(numbers) == 2 and max(numbers) <= 1023:
            yield label.strip(), (numbers[1] / 1023 * width, numbers[0] / 1023 * height)


# %% 1 · label and numbers in one flat tuple
def read_points(text, width, height):
    points = []
    for run, label in re.findall(r"((?:<loc\d{4}>)+)([^;<>\n]*)", text):
        numbers = [int(number) for number in re.findall(r"\d{4}", run)]
        if len(numbers) == 2 and max(numbers) <= 1023:
            points.append((label.strip(), numbers[1] / 1023 * width, numbers[0] / 1023 * height))
    return points


# %% 1 · pairs whose second is a number
def read_points(text, width, height):
    return [(label, 3) for label in re.findall(r"> (\w+)", text)]


# %% 2 · takes the kinds from what was found
def mean_average_precision(found, truth):
    kinds = {d.label for row in found for d in row}
    values = [average_precision(found, truth, k, 0.5 + 0.05 * i) for k in kinds for i in range(10)]
    return sum(values) / len(values)


# %% 2 · counts an absent kind as nought
def mean_average_precision(found, truth):
    kinds = {d.label for row in [*found, *truth] for d in row}
    values = [average_precision(found, truth, k, 0.5 + 0.05 * i) for k in kinds for i in range(10)]
    return sum(0 if v != v else v for v in values) / len(values)


# %% 2 · only the bound 0.50
def mean_average_precision(found, truth):
    kinds = {d.label for row in truth for d in row}
    values = [average_precision(found, truth, k) for k in kinds]
    return sum(values) / len(values)


# %% 2 · nine bounds
def mean_average_precision(found, truth):
    kinds = {d.label for row in truth for d in row}
    values = [average_precision(found, truth, k, 0.5 + 0.05 * i) for k in kinds for i in range(9)]
    return sum(values) / len(values)


# %% 2 · eleven bounds, up to 1.00
def mean_average_precision(found, truth):
    kinds = {d.label for row in truth for d in row}
    values = [average_precision(found, truth, k, 0.5 + 0.05 * i) for k in kinds for i in range(11)]
    return sum(values) / len(values)


# %% 2 · types the kinds of this lesson
def mean_average_precision(found, truth):
    values = [average_precision(found, truth, k, t) for k in KINDS for t in bounds]
    return sum(values) / len(values)


# %% 2 · the mean of three bounds
def mean_average_precision(found, truth):
    kinds = {d.label for row in truth for d in row}
    values = [average_precision(found, truth, k, t) for k in kinds for t in (0.5, 0.75, 0.95)]
    return sum(values) / len(values)


# %% 2 · one kind only
def mean_average_precision(found, truth):
    kind = sorted({d.label for row in truth for d in row})[0]
    return sum(average_precision(found, truth, kind, t) for t in bounds) / 10


# %% 2 · picture by picture
def mean_average_precision(found, truth):
    values = []
    for seen, there in zip(found, truth):
        for k in {d.label for d in there}:
            values += [average_precision([seen], [there], k, 0.5 + 0.05 * i) for i in range(10)]
    return sum(values) / len(values)


# %% 2 · a list of numbers
def mean_average_precision(found, truth):
    kinds = {d.label for row in truth for d in row}
    return [average_precision(found, truth, k, t) for k in kinds for t in bounds]


# %% 3 · does not look at the label
def say_once(detections, limit=0.7):
    kept = []
    for d in sorted(detections, key=lambda d: -d.score):
        if not (box_iou([d.box], [k.box for k in kept]) > limit).any():
            kept.append(d)
    return kept


# %% 3 · compares with dropped ones too
def say_once(detections, limit=0.7):
    order = sorted(detections, key=lambda d: -d.score)
    kept = []
    for i, d in enumerate(order):
        same = [e.box for e in order[:i] if e.label == d.label]
        if not (box_iou([d.box], same) > limit).any():
            kept.append(d)
    return kept


# %% 3 · goes in the given order
def say_once(detections, limit=0.7):
    kept = []
    for d in detections:
        same = [k.box for k in kept if k.label == d.label]
        if not (box_iou([d.box], same) > limit).any():
            kept.append(d)
    return kept


# %% 3 · from unsure to sure
def say_once(detections, limit=0.7):
    kept = []
    for d in sorted(detections, key=lambda d: d.score):
        same = [k.box for k in kept if k.label == d.label]
        if not (box_iou([d.box], same) > limit).any():
            kept.append(d)
    return kept


# %% 3 · only sorts
def say_once(detections, limit=0.7):
    return sorted(detections, key=lambda d: -d.score)


# %% 3 · one of each label
def say_once(detections, limit=0.7):
    kept = {}
    for d in sorted(detections, key=lambda d: d.score):
        kept[d.label] = d
    return sorted(kept.values(), key=lambda d: -d.score)


# %% 3 · forgets its limit
def say_once(detections, limit=0.7):
    kept = []
    for d in sorted(detections, key=lambda d: -d.score):
        same = [k.box for k in kept if k.label == d.label]
        if not (box_iou([d.box], same) > 0.7).any():
            kept.append(d)
    return kept


# %% 3 · any overlap is too much
def say_once(detections, limit=0.7):
    kept = []
    for d in sorted(detections, key=lambda d: -d.score):
        same = [k.box for k in kept if k.label == d.label]
        if not (box_iou([d.box], same) > 0.1).any():
            kept.append(d)
    return kept


# %% 3 · returns the boxes
def say_once(detections, limit=0.7):
    kept = []
    for d in sorted(detections, key=lambda d: -d.score):
        if not (box_iou([d.box], kept) > limit).any():
            kept.append(d.box)
    return kept
