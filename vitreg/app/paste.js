// A pasted picture goes the way of an uploaded one.
() => document.addEventListener('paste', event => {
  const files = event.clipboardData?.files;
  const input = document.querySelector('#upload input[type=file]');
  if (!files?.length || !input) return;
  const handed = new DataTransfer();
  handed.items.add(files[0]);
  input.files = handed.files;
  input.dispatchEvent(new Event('change', { bubbles: true }));
})
