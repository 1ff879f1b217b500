// A brush over an image: `value` is {src, width, height, zoom}; window.studioMasks[NAME]() returns the mask as a PNG
// data URL, white where painted, "" if nothing is.
const COLOUR = "#D55E00";
const brush = { strokes: [], image: null, erase: false, drawing: null, size: 10 };
const one = (selector) => element.querySelector(selector);

function paint(context, stroke) {
	context.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
	context.strokeStyle = context.fillStyle = COLOUR;
	context.lineWidth = stroke.size;
	context.lineCap = context.lineJoin = "round";
	context.beginPath();
	const [first, ...rest] = stroke.points;
	if (rest.length === 0) {
		context.arc(first.x, first.y, stroke.size / 2, 0, 2 * Math.PI);
		context.fill();
		return;
	}
	context.moveTo(first.x, first.y);
	rest.forEach((point) => context.lineTo(point.x, point.y));
	context.stroke();
}

function painted() {
	const mask = document.createElement("canvas");
	mask.width = props.value.width;
	mask.height = props.value.height;
	const context = mask.getContext("2d", { willReadFrequently: true });
	brush.strokes.forEach((stroke) => paint(context, stroke));
	return mask;
}

function draw() {
	const canvas = one("canvas");
	if (!canvas || !props.value || !brush.image) return;
	const { width, height, zoom } = props.value;
	if (canvas.width !== width * zoom) canvas.width = width * zoom;
	if (canvas.height !== height * zoom) canvas.height = height * zoom;
	const context = canvas.getContext("2d");
	context.imageSmoothingEnabled = false;
	context.globalAlpha = 1;
	context.drawImage(brush.image, 0, 0, canvas.width, canvas.height);
	context.globalAlpha = 0.6;
	context.drawImage(painted(), 0, 0, canvas.width, canvas.height);
	canvas.dataset.strokes = brush.strokes.length;
}

function show() {
	if (!props.value || !props.value.src) return;
	const image = new Image();
	image.onload = () => {
		brush.image = image;
		draw();
	};
	image.src = props.value.src;
}

function place(event) {
	const box = one("canvas").getBoundingClientRect();
	return {
		x: ((event.clientX - box.left) / box.width) * props.value.width,
		y: ((event.clientY - box.top) / box.height) * props.value.height,
	};
}

element.addEventListener("pointerdown", (event) => {
	if (!event.target.closest("canvas") || !brush.image || event.button !== 0) return;
	event.preventDefault();
	event.target.setPointerCapture(event.pointerId);
	const size = (Number(one("input[type=range]").value) / 100) * Math.min(props.value.width, props.value.height);
	brush.drawing = { erase: brush.erase, size: Math.max(1, size), points: [place(event)] };
	brush.strokes.push(brush.drawing);
	draw();
});
element.addEventListener("pointermove", (event) => {
	if (!brush.drawing) return;
	brush.drawing.points.push(place(event));
	draw();
});
["pointerup", "pointercancel"].forEach((name) => element.addEventListener(name, () => (brush.drawing = null)));
element.addEventListener("click", (event) => {
	const button = event.target.closest("button[data-do]");
	if (!button) return;
	if (button.dataset.do === "erase") {
		brush.erase = !brush.erase;
		button.setAttribute("aria-pressed", String(brush.erase));
	}
	if (button.dataset.do === "undo") brush.strokes.pop();
	if (button.dataset.do === "clear") brush.strokes = [];
	draw();
});

window.studioMasks = window.studioMasks || {};
window.studioMasks[props.brush] = () => {
	if (!brush.image || brush.strokes.length === 0) return "";
	const mask = painted();
	const context = mask.getContext("2d");
	const pixels = context.getImageData(0, 0, mask.width, mask.height);
	for (let k = 0; k < pixels.data.length; k += 4) {
		const level = pixels.data[k + 3] > 127 ? 255 : 0;
		pixels.data[k] = pixels.data[k + 1] = pixels.data[k + 2] = level;
		pixels.data[k + 3] = 255;
	}
	context.putImageData(pixels, 0, 0);
	return mask.toDataURL("image/png");
};
watch("value", () => {
	brush.strokes = [];
	show();
});
show();
