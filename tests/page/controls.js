// The names of all controls that a visitor can see now: the id under which each stands, and what it is. Given a name, the
// control itself.
const all = 'button, a[href], input, textarea, select, summary, [role=button], [role=checkbox], [onclick], [tabindex]';
const shown = element => element.checkVisibility() && element.getBoundingClientRect().right > 0;
const named = element => {
    const id = element.closest('[id]:not([id^=component]):not([id^=range_])')?.id ?? '';
    const words = element.getAttribute('aria-label') || element.title || element.innerText?.trim() || element.type;
    return `${id}: ${(words ?? element.tagName).split('\n')[0].slice(0, 30)}`;
};
const found = [...document.querySelectorAll(all)].filter(shown);
return arguments.length ? found.find(element => named(element) === arguments[0]) : found.map(named);
