import { useId, useLayoutEffect, useRef, type ReactNode } from "react"
import { text } from "./text"

/** A modal dialog: the browser keeps the focus inside, closes it at Escape, and gives the focus back. */
export function Dialog({ title, close, children }: { title: string, close: () => void, children: ReactNode }) {
  const dialog = useRef<HTMLDialogElement>(null)
  const id = useId()
  useLayoutEffect(() => { // its end comes before the element goes: so the focus finds its way back
    const element = dialog.current!
    if (!element.open) element.showModal()
    return () => element.close()
  }, [])
  return (
    <dialog ref={dialog} aria-labelledby={id} onCancel={event => { event.preventDefault(); close() }}>
      <h2 id={id}>{title}</h2>
      {children}
    </dialog>
  )
}

export function Confirm({ title, body, action, confirm, close }:
    { title: string, body: string, action: string, confirm: () => void, close: () => void }) {
  return (
    <Dialog title={title} close={close}>
      <p>{body}</p>
      <div className="row end">
        <button autoFocus onClick={close}>{text.cancel}</button>
        <button className="danger" onClick={() => { close(); confirm() }}>{action}</button>
      </div>
    </Dialog>
  )
}
